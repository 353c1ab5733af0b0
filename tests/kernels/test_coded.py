"""Coded keys and values: the same codes in C++ and torch, and attention over what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.libraries import DTYPES, native_kernels
from trimtab.kernels.coded import CodedTables
from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kernels.reference import TorchKernels
from trimtab.kernels.reference_coded import unpacked

LAYERS, HEADS, SLOTS = 2, 2, 2


@dataclass
class Store:
    """One arena with its tables; every table entry names a page of its own."""

    c: CodedTables
    k: Tensor  # [layers, slots * tokens, HEADS, d]
    v: Tensor
    tokens: int


def make_store(
    dtype: torch.dtype,
    bits: int = 2,
    group: int = 32,
    d: int = 64,
    tokens: int = 128,
    query_heads: int = 4,
    by_token: bool = False,
) -> Store:
    g = torch.Generator().manual_seed(0)
    blocks = tokens // PAGE + 2
    shape = (SLOTS, LAYERS, HEADS, blocks)
    tables = [torch.zeros(shape, dtype=torch.int32) for _ in range(4)]
    counts = [torch.zeros(shape[:3], dtype=torch.int32) for _ in range(3)]
    rows = PagedRows(
        arena=torch.empty(0, dtype=dtype),
        table=tables[0],
        start=counts[0],
        spans=torch.tensor([[s, s * tokens, (s + 1) * tokens] for s in range(SLOTS)], dtype=torch.int32),
        num_heads=query_heads,
        num_kv_heads=HEADS,
        head_dim=d,
        scale=d**-0.5,
        table_seq=LAYERS * HEADS * blocks,
        table_head=blocks,
        table_layer=HEADS * blocks,
        start_seq=LAYERS * HEADS,
        start_head=1,
        start_layer=HEADS,
    )
    c = CodedTables(
        rows=rows,
        arena=torch.empty(0),
        v_full=tables[1],
        k_coded=tables[2],
        v_coded=tables[3],
        k_done=counts[1],
        v_done=counts[2],
        bits=bits,
        group=group,
        by_token=by_token,
    )
    at = 0  # pages of a table lie one behind the other, shuffled
    for table, size in zip(tables, (c.full_bytes, c.full_bytes, c.k_bytes, c.v_bytes), strict=True):
        first = -(-at // size)
        order = torch.randperm(table.numel(), generator=g).to(torch.int32) + first
        table.copy_(order.view(shape))
        at = (first + table.numel()) * size
    c.arena = torch.full(
        (-(-at // c.full_bytes) * c.full_bytes,), 0xFF, dtype=torch.uint8
    )  # NaN in every type
    rows.arena = c.arena.view(dtype)
    content = (LAYERS, SLOTS * tokens, HEADS, d)
    return Store(c, torch.randn(content, generator=g), torch.randn(content, generator=g), tokens)


def twin(store: Store) -> Store:
    c = replace(
        store.c, arena=store.c.arena.clone(), k_done=store.c.k_done.clone(), v_done=store.c.v_done.clone()
    )
    c.rows = replace(c.rows, arena=c.arena.view(store.c.rows.arena.dtype), start=c.rows.start.clone())
    return replace(store, c=c)


def at_layer(c: CodedTables, layer: int) -> CodedTables:
    c.rows.table_offset, c.rows.start_offset = layer * c.rows.table_layer, layer * c.rows.start_layer
    return c


def write(kernels: Any, store: Store) -> None:
    for layer in range(LAYERS):
        kernels.write_coded(at_layer(store.c, layer), store.k[layer], store.v[layer])


def code(kernels: Any, store: Store, slot: int, keys: Any, values: Any) -> None:
    """Code up to as many keys and values; a number, or one for each layer and head."""
    k_to, v_to = (
        torch.tensor(x, dtype=torch.int32).expand(LAYERS, HEADS).contiguous() for x in (keys, values)
    )
    kernels.code(at_layer(store.c, 0), slot, LAYERS, k_to, v_to)
    store.c.k_done[slot], store.c.v_done[slot] = k_to, v_to


def unpacked_all(store: Store, slot: int, total: int) -> tuple[Tensor, Tensor]:
    """k, v [layers, heads, total, d] as stored."""
    parts = [unpacked(at_layer(store.c, x), slot, h, total) for x in range(LAYERS) for h in range(HEADS)]
    k, v = (torch.stack(p).unflatten(0, (LAYERS, HEADS)) for p in zip(*parts, strict=True))
    return k, v


def round_trip(x: Tensor, bits: int, group: int) -> Tensor:
    """Min-max quantization of groups in the last axis, constants rounded to float16."""
    x = x.unflatten(-1, (-1, group))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    codes = ((x - zero) / scale).round().clamp(0, 2**bits - 1)
    return (torch.where(scale > 0, codes, torch.zeros_like(codes)) * scale + zero).flatten(-2)


bits_ = pytest.mark.parametrize("bits", [2, 3, 4, 8])
coding = pytest.mark.parametrize("by_token", [False, True], ids=["by channel", "by token"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@bits_
@coding
@pytest.mark.parametrize("group,d", [(16, 16), (32, 64), (8, 16), (24, 48), (5, 80), (64, 128)])
def test_both_code_the_same_bits(dtype: torch.dtype, bits: int, group: int, d: int, by_token: bool) -> None:
    keys = 128 if by_token else 128 // group * group
    store = make_store(dtype, bits, group, d, by_token=by_token)
    store.k[:, :, 0, 1] *= 100  # a channel of outliers
    store.k[:, :, 1, 2] = 0.25  # a channel without spread
    store.v[:, 5] = -7.0
    other = twin(store)
    for kernels, s in ((native_kernels(dtype), store), (TorchKernels(), other)):
        write(kernels, s)
        code(kernels, s, 1, keys, 101)
    for mine, theirs in zip(unpacked_all(store, 1, 128), unpacked_all(other, 1, 128), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(store.c.arena, other.c.arena), "not a byte is written that has no meaning"


@bits_
@coding
@pytest.mark.parametrize("group,d", [(32, 64), (8, 16), (24, 48)])
def test_codes_mean_min_max_quantization(
    kernels_for: Callable[[torch.dtype], Any], bits: int, by_token: bool, group: int, d: int
) -> None:
    kernels = kernels_for(torch.float32)
    store = make_store(torch.float32, bits, group, d, by_token=by_token)
    write(kernels, store)
    code(kernels, store, 0, 96, 77)
    k, v = unpacked_all(store, 0, 128)
    true_k, true_v = (x[:, :128].permute(0, 2, 1, 3) for x in (store.k, store.v))
    groups = true_k[:, :, :96] if by_token else true_k[:, :, :96].transpose(2, 3)
    expected = round_trip(groups, bits, group)
    expected = expected if by_token else expected.transpose(2, 3)
    torch.testing.assert_close(k[:, :, :96], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(v[:, :, :77], round_trip(true_v[:, :, :77], bits, group), atol=1e-6, rtol=1e-6)
    assert torch.equal(k[:, :, 96:], true_k[:, :, 96:]) and torch.equal(v[:, :, 77:], true_v[:, :, 77:])
    # Nothing is off by more than half a step, and by what rounding the constants to float16 adds.
    x = groups.unflatten(-1, (-1, group))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    bound = (high - low) * (0.5 / (2**bits - 1) + 2**-11) + low.abs() * 2**-11
    got = (k[:, :, :96] if by_token else k[:, :, :96].transpose(2, 3)).unflatten(-1, (-1, group))
    assert ((got - x).abs() <= bound + 1e-6).all()


@bits_
@coding
def test_coding_in_pieces_gives_the_bits_of_coding_at_once(
    kernels_for: Callable[[torch.dtype], Any], bits: int, by_token: bool
) -> None:
    kernels, group = kernels_for(torch.bfloat16), 8
    at_once, pieces = (make_store(torch.bfloat16, bits, group, by_token=by_token) for _ in range(2))
    for store in (at_once, pieces):
        write(kernels, store)
    code(kernels, at_once, 0, 128, 128)
    values = 0
    for step in (1, 31, 1, 1, 30, 5, 59):
        values += step
        code(kernels, pieces, 0, values if by_token else values // group * group, values)
    assert values == 128
    assert torch.equal(at_once.c.arena, pieces.c.arena)


def test_coding_one_text_leaves_the_others(kernels_for: Callable[[torch.dtype], Any]) -> None:
    kernels = kernels_for(torch.float32)
    store = make_store(torch.float32)
    write(kernels, store)
    before = unpacked_all(store, 1, 128)
    code(kernels, store, 0, 128, 128)
    for mine, theirs in zip(before, unpacked_all(store, 1, 128), strict=True):
        assert torch.equal(mine, theirs)


def dense(store: Store, slot: int, q: Tensor, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Output and logsumexp in float64 over the numbers that the codes mean; q are the last rows."""
    count, group = q.shape[0], q.shape[1] // HEADS
    outs, lses = [], []
    for head in range(HEADS):
        k, v = (x.double() for x in unpacked(at_layer(store.c, layer), slot, head, tokens))
        mine = q[:, head * group : (head + 1) * group].double()
        scores = torch.einsum("ngd,td->ngt", mine, k) * store.c.rows.scale
        unseen = torch.arange(tokens)[None] > tokens - count + torch.arange(count)[:, None]
        scores = scores.masked_fill(unseen[:, None], -torch.inf)
        outs.append(torch.einsum("ngt,td->ngd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs, 1), torch.cat(lses, 1)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@bits_
@coding
@pytest.mark.parametrize("group,d", [(32, 64), (16, 48), (8, 16)])
@pytest.mark.parametrize("tokens,keys,values,new", [(128, 96, 77, 3), (576, 544, 525, 9), (64, 0, 0, 20)])
def test_attention_over_coded_rows(
    kernels_for: Callable[[torch.dtype], Any],
    bits: int,
    by_token: bool,
    group: int,
    d: int,
    dtype: torch.dtype,
    tokens: int,
    keys: int,
    values: int,
    new: int,
) -> None:
    kernels = kernels_for(dtype)
    store = make_store(dtype, bits, group, d, tokens=tokens, by_token=by_token)
    write(kernels, store)
    keys += 8 if keys and (by_token or group == 8) else 0  # half a page
    code(kernels, store, 1, keys, values)
    c = store.c
    c.rows.start[1] = tokens - new
    c.rows.spans = torch.tensor([[1, 0, new]], dtype=torch.int32)
    q = torch.randn(new, 4, d, generator=torch.Generator().manual_seed(9))
    for layer in range(LAYERS):
        out, lse = kernels.attend_coded(at_layer(c, layer), q)
        expected, z = dense(store, 1, q, layer, tokens)
        torch.testing.assert_close(out.double(), expected, atol=4e-6, rtol=2e-5)
        torch.testing.assert_close(lse.double(), z, atol=4e-6, rtol=1e-5)
        sums = torch.zeros(1, HEADS, tokens)
        kernels.column_sums_coded(at_layer(c, layer), q, lse, sums, new - 1)
        torch.testing.assert_close(sums.sum(2), torch.full((1, HEADS), 2.0), atol=1e-4, rtol=1e-4)


def test_every_head_has_its_own_length(kernels_for: Callable[[torch.dtype], Any]) -> None:
    kernels = kernels_for(torch.float32)
    store = make_store(torch.float32, group=16)
    write(kernels, store)
    code(kernels, store, 0, [[16, 96], [0, 112]], [[20, 100], [3, 64]])
    lengths = [[30, 120], [9, 113]]
    c = store.c
    c.rows.start[0] = torch.tensor(lengths)
    c.rows.spans = torch.tensor([[0, 0, 1]], dtype=torch.int32)
    q = torch.randn(1, 4, 64)
    for layer in range(LAYERS):
        out = kernels.attend_coded(at_layer(c, layer), q)[0]
        for head in range(HEADS):
            expected = dense(store, 0, q, layer, lengths[layer][head] + 1)[0]
            mine = slice(2 * head, 2 * head + 2)
            torch.testing.assert_close(out[:, mine].double(), expected[:, mine], atol=4e-6, rtol=1e-5)


@coding
@pytest.mark.parametrize("group", [8, 16, 32])
@pytest.mark.parametrize("heads", [2, 6, 8, 16, 22, 34])
def test_coded_rows_have_the_same_bits_in_every_grouping(heads: int, group: int, by_token: bool) -> None:
    """One row of one text at a time, in one call, on several threads; groups of 1 to 17 query heads."""
    kernels = native_kernels(torch.bfloat16)
    store = make_store(torch.bfloat16, 3, group, tokens=640, query_heads=heads, by_token=by_token)
    write(kernels, store)
    code(kernels, store, 0, 544, 530)
    code(kernels, store, 1, 96, 33)
    c = at_layer(store.c, 1)
    q = torch.randn(12, heads, 64)
    c.rows.start[0], c.rows.start[1] = 632, 636
    c.rows.spans = torch.tensor([[0, 0, 8], [1, 8, 12]], dtype=torch.int32)
    whole = kernels.attend_coded(c, q)[0]
    assert torch.equal(native_kernels(torch.bfloat16, 5).attend_coded(c, q)[0], whole)
    for i in range(12):
        slot, base = (0, 632 + i) if i < 8 else (1, 636 + i - 8)
        c.rows.start[slot] = base
        c.rows.spans = torch.tensor([[slot, 0, 1]], dtype=torch.int32)
        assert torch.equal(kernels.attend_coded(c, q[i : i + 1].contiguous())[0][0], whole[i])


def test_a_tree_of_new_rows(kernels_for: Callable[[torch.dtype], Any]) -> None:
    """Rows hidden by the mask: as if they were not there."""
    kernels = kernels_for(torch.float32)
    store = make_store(torch.float32)
    write(kernels, store)
    code(kernels, store, 0, 96, 90)
    c = at_layer(store.c, 0)
    c.rows.start[0] = 125
    c.rows.spans = torch.tensor([[0, 0, 3]], dtype=torch.int32)
    c.rows.mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.uint8).flatten()
    q = torch.randn(3, 4, 64)
    got = kernels.attend_coded(c, q)[0]
    k, v = unpacked(c, 0, 1, 128)
    keep = [*range(126), 127]
    scores = torch.einsum("gd,td->gt", q[2, 2:4], k[keep]) * 64**-0.5
    torch.testing.assert_close(got[2, 2:4], scores.softmax(-1) @ v[keep], atol=3e-6, rtol=1e-5)


@bits_
@pytest.mark.parametrize("group", [8, 24, 32])
def test_a_unit_has_the_bytes_of_its_codes_and_constants(bits: int, group: int) -> None:
    c = make_store(torch.bfloat16, bits, group, d=96).c
    tokens = math.lcm(group, 16)
    assert c.k_bytes == tokens * 96 * bits / 8 + tokens * 96 / group * 4
    assert c.v_bytes == 16 * 96 * bits / 8 + 16 * 96 / group * 4
