"""Packed keys and values: the same codes in C++ and torch, and attention over what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.libraries import DTYPES, native_kernels
from trimtab.kernels.packed import PackedRows
from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kernels.reference import TorchKernels
from trimtab.kernels.reference_packed import unpacked

LAYERS, HEADS, SLOTS = 2, 2, 2
TABLES = ("k_full", "v_full", "k_packed", "v_packed")


@dataclass
class Store:
    """One arena with its tables; every table entry names a block of its own."""

    p: PackedRows
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
    seed: int = 0,
) -> Store:
    g = torch.Generator().manual_seed(seed)
    blocks = tokens // PAGE + 2
    rows = PagedRows(
        arena=torch.empty(0),
        table=torch.zeros(SLOTS, blocks, dtype=torch.int32),
        start=torch.zeros(SLOTS, dtype=torch.int32),
        spans=torch.tensor([[s, s * tokens, (s + 1) * tokens] for s in range(SLOTS)], dtype=torch.int32),
        num_heads=query_heads,
        num_kv_heads=HEADS,
        head_dim=d,
        scale=d**-0.5,
        table_seq=blocks,
        start_seq=1,
    )
    zeros = torch.zeros(SLOTS, dtype=torch.int32)
    tables = {name: torch.zeros(SLOTS, blocks, dtype=torch.int32) for name in TABLES}
    p = PackedRows(
        rows,
        torch.empty(0),
        **tables,
        k_done=zeros.clone(),
        v_done=zeros.clone(),
        bits=bits,
        group=group,
        num_layers=LAYERS,
    )
    full = p.full_unit(dtype.itemsize)
    at = 0  # blocks of a table lie one behind the other, shuffled
    for name, unit in zip(TABLES, (full, full, p.k_unit, p.v_unit), strict=True):
        size = unit * p.n_units
        first = -(-at // size)
        order = torch.randperm(SLOTS * blocks, generator=g).to(torch.int32) + first
        getattr(p, name).copy_(order.view(SLOTS, blocks))
        at = (first + SLOTS * blocks) * size
    at = -(-at // (full * p.n_units)) * full * p.n_units
    p.arena = torch.full((at,), 0xFF, dtype=torch.uint8)  # NaN in every type
    rows.arena = p.arena.view(dtype)
    shape = (LAYERS, SLOTS * tokens, HEADS, d)
    return Store(p, torch.randn(shape, generator=g), torch.randn(shape, generator=g), tokens)


def twin(store: Store) -> Store:
    p = replace(
        store.p, arena=store.p.arena.clone(), k_done=store.p.k_done.clone(), v_done=store.p.v_done.clone()
    )
    p.rows = replace(p.rows, arena=p.arena.view(store.p.rows.arena.dtype), start=p.rows.start.clone())
    return replace(store, p=p)


def write(kernels: Any, store: Store) -> None:
    for store.p.layer in range(LAYERS):
        kernels.write_packed(store.p, store.k[store.p.layer], store.v[store.p.layer])


def pack(kernels: Any, store: Store, slot: int, keys: range, values: range) -> None:
    """Keys and values of `slot` in the token ranges given, which start where packing stopped."""
    p = store.p
    assert keys.start == p.k_done[slot] and values.start == p.v_done[slot]
    kernels.pack(p, slot, range(keys.start // p.group, keys.stop // p.group), values)
    p.k_done[slot], p.v_done[slot] = keys.stop, values.stop


def unpacked_all(store: Store, slot: int, total: int) -> tuple[Tensor, Tensor]:
    """k, v [layers, heads, total, d] as stored."""
    ks, vs = [], []
    for store.p.layer in range(LAYERS):
        for head in range(HEADS):
            k, v = unpacked(store.p, slot, head, total)
            ks.append(k)
            vs.append(v)
    return torch.stack(ks).unflatten(0, (LAYERS, HEADS)), torch.stack(vs).unflatten(0, (LAYERS, HEADS))


def round_trip(x: Tensor, bits: int) -> Tensor:
    """Min-max quantization of groups in the last axis, constants rounded to float16."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    codes = ((x - zero) / scale).round().clamp(0, 2**bits - 1)
    return torch.where(scale > 0, codes, torch.zeros_like(codes)) * scale + zero


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group,d", [(16, 16), (32, 64), (16, 80), (64, 128)])
def test_both_pack_the_same_bits(dtype: torch.dtype, bits: int, group: int, d: int) -> None:
    store = make_store(dtype, bits, group, d)
    store.k[:, :, 0, 1] *= 100  # a channel of outliers
    store.k[:, :, 1, 2] = 0.25  # a channel without spread
    store.v[:, 5] = -7.0
    other = twin(store)
    for kernels, s in ((native_kernels(dtype), store), (TorchKernels(), other)):
        write(kernels, s)
        pack(kernels, s, 1, range(128), range(0, 101))
    # Half a page of packed values is garbage by right: compare what is meant, and the keys' bytes.
    for mine, theirs in zip(unpacked_all(store, 1, 128), unpacked_all(other, 1, 128), strict=True):
        assert torch.equal(mine, theirs)
    p, unit = store.p, store.p.k_unit * store.p.n_units
    for block in p.k_packed[1, : 128 // group].tolist():
        at = slice(block * unit, (block + 1) * unit)
        assert torch.equal(store.p.arena[at], other.p.arena[at])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_mean_min_max_quantization(kernels_for: Callable[[torch.dtype], Any], bits: int) -> None:
    kernels, group = kernels_for(torch.float32), 32
    store = make_store(torch.float32, bits, group)
    write(kernels, store)
    pack(kernels, store, 0, range(96), range(0, 77))
    k, v = unpacked_all(store, 0, 128)
    true_k = store.k[:, :128].permute(0, 2, 1, 3)
    true_v = store.v[:, :128].permute(0, 2, 1, 3)
    by_channel = true_k[:, :, :96].transpose(2, 3).unflatten(3, (-1, group))
    expected_k = round_trip(by_channel, bits).flatten(3).transpose(2, 3)
    expected_v = round_trip(true_v[:, :, :77].unflatten(3, (-1, group)), bits).flatten(3)
    torch.testing.assert_close(k[:, :, :96], expected_k, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(v[:, :, :77], expected_v, atol=1e-6, rtol=1e-6)
    assert torch.equal(k[:, :, 96:], true_k[:, :, 96:]) and torch.equal(v[:, :, 77:], true_v[:, :, 77:])
    # Nothing is off by more than half a step, and by what rounding the constants to float16 adds.
    low, high = by_channel.amin(-1, keepdim=True), by_channel.amax(-1, keepdim=True)
    bound = (high - low) * (0.5 / (2**bits - 1) + 2**-11) + low.abs() * 2**-11
    got = k[:, :, :96].transpose(2, 3).unflatten(3, (-1, group))
    assert ((got - by_channel).abs() <= bound).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_in_pieces_gives_the_bits_of_packing_at_once(
    kernels_for: Callable[[torch.dtype], Any], bits: int
) -> None:
    kernels = kernels_for(torch.bfloat16)
    at_once, pieces = make_store(torch.bfloat16, bits), make_store(torch.bfloat16, bits)
    for store in (at_once, pieces):
        write(kernels, store)
    pack(kernels, at_once, 0, range(128), range(128))
    keys = values = 0
    for step in (1, 31, 1, 1, 30, 5, 59):
        values_end = values + step
        keys_end = values_end // 32 * 32
        pack(kernels, pieces, 0, range(keys, keys_end), range(values, values_end))
        keys, values = keys_end, values_end
    assert values == keys == 128
    assert torch.equal(at_once.p.arena, pieces.p.arena)


def test_packing_one_text_leaves_the_others(kernels_for: Callable[[torch.dtype], Any]) -> None:
    kernels = kernels_for(torch.float32)
    store = make_store(torch.float32)
    write(kernels, store)
    before = unpacked_all(store, 1, 128)
    pack(kernels, store, 0, range(128), range(128))
    after = unpacked_all(store, 1, 128)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "tokens,k_done,v_done,new", [(128, 96, 77, 3), (128, 128, 128, 0), (576, 544, 525, 9), (64, 0, 0, 20)]
)
def test_attention_over_packed_rows(
    kernels_for: Callable[[torch.dtype], Any],
    bits: int,
    dtype: torch.dtype,
    tokens: int,
    k_done: int,
    v_done: int,
    new: int,
) -> None:
    """Against a dense softmax over the numbers that the codes mean; `new` rows ask, causally."""
    kernels = kernels_for(dtype)
    store = make_store(dtype, bits, tokens=tokens)
    write(kernels, store)
    pack(kernels, store, 1, range(k_done), range(v_done))
    p, count = store.p, max(new, 1)
    base = tokens - count
    p.rows.start[1] = base
    p.rows.spans = torch.tensor([[1, 0, count]], dtype=torch.int32)
    q = torch.randn(count, 4, 64, generator=torch.Generator().manual_seed(9))
    for p.layer in range(LAYERS):
        got = kernels.attend_packed(p, q)
        for head in range(HEADS):
            k, v = (x.double() for x in unpacked(p, 1, head, tokens))
            scores = torch.einsum("ngd,td->ngt", q[:, 2 * head : 2 * head + 2].double(), k) * 64**-0.5
            unseen = torch.arange(tokens)[None] > base + torch.arange(count)[:, None]
            scores = scores.masked_fill(unseen[:, None], -torch.inf)
            expected = torch.einsum("ngt,td->ngd", scores.softmax(-1), v)
            torch.testing.assert_close(
                got[:, 2 * head : 2 * head + 2].double(), expected, atol=3e-6, rtol=1e-5
            )


@pytest.mark.parametrize("heads", [2, 6, 8, 16, 22, 34])
def test_packed_rows_have_the_same_bits_in_every_grouping(heads: int) -> None:
    """One row of one text at a time, in one call, on several threads; groups of 1 to 17 query heads."""
    kernels = native_kernels(torch.bfloat16)
    store = make_store(torch.bfloat16, tokens=640, query_heads=heads)
    write(kernels, store)
    for slot, keys, values in ((0, 512, 530), (1, 96, 33)):
        pack(kernels, store, slot, range(keys), range(values))
    p = store.p
    p.layer = 1
    q = torch.randn(12, heads, 64)
    p.rows.start = torch.tensor([632, 636], dtype=torch.int32)
    p.rows.spans = torch.tensor([[0, 0, 8], [1, 8, 12]], dtype=torch.int32)
    whole = kernels.attend_packed(p, q)
    assert torch.equal(native_kernels(torch.bfloat16, 5).attend_packed(p, q), whole)
    for i in range(12):
        slot, base = (0, 632 + i) if i < 8 else (1, 636 + i - 8)
        p.rows.start[slot] = base
        p.rows.spans = torch.tensor([[slot, 0, 1]], dtype=torch.int32)
        assert torch.equal(kernels.attend_packed(p, q[i : i + 1].contiguous())[0], whole[i])


def test_a_tree_of_new_rows(kernels_for: Callable[[torch.dtype], Any]) -> None:
    """Rows hidden by the mask: as if they were not there."""
    kernels = kernels_for(torch.float32)
    store = make_store(torch.float32)
    write(kernels, store)
    pack(kernels, store, 0, range(96), range(90))
    p = store.p
    p.rows.start[0] = 125
    p.rows.spans = torch.tensor([[0, 0, 3]], dtype=torch.int32)
    p.rows.mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.uint8).flatten()
    q = torch.randn(3, 4, 64)
    got = kernels.attend_packed(p, q)
    k, v = unpacked(p, 0, 1, 128)
    keep = [*range(126), 127]
    scores = torch.einsum("gd,td->gt", q[2, 2:4], k[keep]) * 64**-0.5
    torch.testing.assert_close(got[2, 2:4], scores.softmax(-1) @ v[keep], atol=3e-6, rtol=1e-5)
