"""The per-layer coded cache: C++ against plain torch, with codes, rows kept in full and trees of drafts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.libraries import DTYPES, native_kernels
from trimtab.kernels import native_per_layer, reference_per_layer
from trimtab.kernels.affine import AffineCodec
from trimtab.kernels.codes import block_bytes, pack_codes, unpack_codes
from trimtab.kernels.per_layer import Codec, PerLayerTables
from trimtab.kernels.reference import TorchKernels

LAYERS, H, G, D = 2, 6, 2, 16
WIDTH, SLOTS, BLOCKS, MOST = G * D, 3, 80, 3
TORCH = TorchKernels()


def tables(
    dtype: torch.dtype = torch.float32,
    bits: int = 2,
    *,
    group: int = 16,
    hadamard: int = 32,
    folded: bool = False,
    ordered: bool = True,
    rope: bool = True,
    codec: Codec | None = None,
) -> PerLayerTables:
    """Three texts of 40, 600 and 3 rows, of which 37, 590 and none are coded; nothing is written yet."""
    g = torch.Generator().manual_seed(5)
    codec = codec or AffineCodec(bits, WIDTH, group, 0.8 if bits == 2 else 1.0)
    lengths = torch.tensor([40, 600, 3], dtype=torch.int32)
    t = PerLayerTables(
        arena=torch.empty(0, dtype=torch.uint8),
        full=torch.randperm(SLOTS * BLOCKS, generator=g).int().view(SLOTS, BLOCKS),
        coded=torch.zeros(SLOTS, BLOCKS, dtype=torch.int32),
        kept_at=torch.tensor([[[0, 5, 36], [2, 0, 0]], [[17, 18, 589], [300, 511, 0]], [[0] * 3] * 2]).int(),
        kept_page=torch.zeros(SLOTS, LAYERS, MOST, dtype=torch.int32),
        kept_count=torch.tensor([[3, 1], [3, 2], [0, 0]], dtype=torch.int32),
        start=lengths,
        done=torch.zeros(SLOTS, dtype=torch.int32),
        spans=torch.empty(0, 3, dtype=torch.int32),
        rows_like=torch.empty(0, dtype=dtype),
        num_layers=LAYERS,
        num_heads=H,
        num_kv_heads=G,
        head_dim=D,
        scale=D**-0.5,
        codec=codec,
        hadamard=hadamard,
        folded=folded,
    )
    # Three parts of the arena, each of whole units of every kind.
    blocks = SLOTS * BLOCKS
    first = blocks * t.full_block
    t.coded += -(-first // t.coded_block) + torch.randperm(blocks, generator=g).int().view(SLOTS, BLOCKS)
    end = (int(t.coded.max()) + 1) * t.coded_block
    t.kept_page += -(-end // t.row_bytes) + torch.arange(SLOTS * LAYERS * MOST).int().view(
        SLOTS, LAYERS, MOST
    )
    unit = t.full_block * t.coded_block
    size = -(-(int(t.kept_page.max()) + 1) * t.row_bytes // unit) * unit
    t.arena = torch.randint(0, 100, (size,), dtype=torch.uint8, generator=g)
    if ordered:
        t.order = torch.stack([torch.randperm(WIDTH, generator=g).int() for _ in range(LAYERS)])
    if rope:
        angle = torch.rand(BLOCKS, D // 2, 16, generator=g) * 6
        t.cos, t.sin = angle.cos(), angle.sin()
    return t


def fill(t: PerLayerTables, ops: object, kernels: object) -> None:
    """Write the rows of every text in pieces of any size, and code what is due, again in pieces."""
    g = torch.Generator().manual_seed(6)
    lengths, start = t.start.clone(), torch.zeros_like(t.start)
    t.start = start
    for slot, length in enumerate(lengths.tolist()):
        while int(start[slot]) < length:
            n = min(70, length - int(start[slot]))
            t.spans = torch.tensor([[slot, 0, n]], dtype=torch.int32)
            for layer in range(LAYERS):
                t.layer = layer
                k, v = torch.randn(2, n, G, D, generator=g).unbind()
                ops.write(kernels, t, k.contiguous() * 2 + 0.5, v.contiguous())  # type: ignore[attr-defined]
            start[slot] += n
    for slot, cuts in ((0, (0, 30, 31, 37)), (1, (0, 590))):
        for a, b in itertools.pairwise(cuts):
            ops.code(kernels, t, slot, range(a, b))  # type: ignore[attr-defined]
            t.done[slot] = b


def library(dtype: torch.dtype, threads: int = 1) -> object:
    kernels = native_kernels(dtype, threads)
    native_per_layer.prepare(kernels)
    return kernels


def query(rows: int) -> Tensor:
    return torch.randn(rows, H, D, generator=torch.Generator().manual_seed(9)) * 2


def new_rows(t: PerLayerTables, ops: object, kernels: object, counts: tuple[int, int, int]) -> int:
    ends = torch.tensor(counts).cumsum(0).tolist()
    t.spans = torch.tensor([[i, e - n, e] for i, (n, e) in enumerate(zip(counts, ends, strict=True))]).int()
    t.layer = 1
    g = torch.Generator().manual_seed(7)
    k, v = torch.randn(2, ends[-1], G, D, generator=g).unbind()
    ops.write(kernels, t, k.contiguous(), v.contiguous())  # type: ignore[attr-defined]
    return ends[-1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 16, 16), generator=torch.Generator().manual_seed(bits))
    blocks = pack_codes(codes, bits)
    assert blocks.shape == (5, block_bytes(bits))
    assert torch.equal(unpack_codes(blocks, bits), codes)


@pytest.mark.parametrize("block", [1, 2, 16, 32])
def test_a_hadamard_transform_is_its_own_inverse_and_keeps_lengths(block: int) -> None:
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    y = x.clone()
    native_per_layer.hadamard(library(torch.float32), y, block)  # type: ignore[arg-type]
    torch.testing.assert_close(y, reference_per_layer.transformed(x, block), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    matrix = reference_per_layer.transformed(torch.eye(32), block)
    torch.testing.assert_close(matrix @ matrix, torch.eye(32), atol=1e-6, rtol=0)
    assert torch.equal(matrix[:block, :block].abs(), torch.full((block, block), block**-0.5))


SETTINGS = [
    {},
    {"bits": 3},
    {"bits": 4, "group": 32},
    {"hadamard": 8, "ordered": False},
    {"folded": True},
    {"rope": False, "hadamard": 1},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_native_is_the_reference(settings: dict[str, int], dtype: torch.dtype) -> None:
    kernels = library(dtype)
    mine, other = tables(dtype, **settings), tables(dtype, **settings)  # type: ignore[arg-type]
    fill(mine, native_per_layer, kernels)
    fill(other, reference_per_layer, TORCH)
    for t, ops, k in ((mine, native_per_layer, kernels), (other, reference_per_layer, TORCH)):
        n = new_rows(t, ops, k, (4, 30, 1))
    # A sum in another order may tip a code over; no more than a few of tens of thousands of bytes differ.
    assert (mine.arena != other.arena).float().mean() < 1e-4
    q = query(n)
    got = native_per_layer.attend(kernels, mine, q)  # type: ignore[arg-type]
    expected = reference_per_layer.attend(TORCH, mine, q)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_codes_are_near_and_kept_rows_exact() -> None:
    exact, coded = tables(bits=4, rope=False), tables(bits=4, rope=False)
    fill(coded, native_per_layer, library(torch.float32))
    fill(exact, native_per_layer, library(torch.float32))
    exact.done.zero_()
    for layer in range(LAYERS):
        exact.layer = coded.layer = layer
        (k, v), (k4, v4) = (reference_per_layer.seen(t, 1, 600) for t in (exact, coded))
        kept, _ = reference_per_layer.kept_rows(coded, 1, layer)
        whole = [*kept.tolist(), *range(590, 600)]
        assert torch.equal(k[whole], k4[whole]) and torch.equal(v[whole], v4[whole])
        rest = [i for i in range(590) if i not in whole]
        for x, y in ((k, k4), (v, v4)):
            error = (x[rest] - y[rest]).norm() / x[rest].norm()
            assert 0.01 < error < 0.12


def test_a_tree_of_drafts_turns_by_position_and_hides_siblings() -> None:
    kernels = library(torch.float32)
    t = tables()
    fill(t, native_per_layer, kernels)
    n = new_rows(t, native_per_layer, kernels, (3, 0, 3))
    t.spans = t.spans[[0, 2]].contiguous()
    q = query(n)
    chain = native_per_layer.attend(kernels, t, q)  # type: ignore[arg-type]
    # Rows 1 and 2 are both children of row 0: they have the same position and do not see one another.
    t.mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.uint8).flatten().repeat(2)
    assert t.cos is not None and t.sin is not None
    at = torch.tensor([40, 41, 41, 3, 4, 4])
    t.new_cos, t.new_sin = (x.transpose(1, 2).flatten(0, 1)[at].contiguous() for x in (t.cos, t.sin))
    tree = native_per_layer.attend(kernels, t, q)  # type: ignore[arg-type]
    torch.testing.assert_close(tree, reference_per_layer.attend(TORCH, t, q), atol=2e-5, rtol=1e-4)
    assert torch.equal(tree[[0, 1, 3, 4]], chain[[0, 1, 3, 4]])
    assert (tree[[2, 5]] - chain[[2, 5]]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_batch_and_chunks_do_not_change_a_bit(dtype: torch.dtype) -> None:
    one, three = library(dtype), library(dtype, 3)
    t = tables(dtype)
    fill(t, native_per_layer, one)
    n = new_rows(t, native_per_layer, one, (4, 60, 1))
    q = query(n)
    whole = native_per_layer.attend(one, t, q)  # type: ignore[arg-type]
    assert torch.equal(native_per_layer.attend(three, t, q), whole)  # type: ignore[arg-type]
    for slot, begin, end in t.spans.tolist():
        alone = replace(t, spans=torch.tensor([[slot, 0, end - begin]], dtype=torch.int32))
        for kernels in (one, three):  # one text's few rows: threads share its superblocks
            got = native_per_layer.attend(kernels, alone, q[begin:end].contiguous())  # type: ignore[arg-type]
            assert torch.equal(got, whole[begin:end])
    begin, end = t.spans[1, 1:].tolist()
    later = replace(t, spans=torch.tensor([[1, 0, 25]], dtype=torch.int32), start=t.start + 35)
    got = native_per_layer.attend(one, later, q[begin + 35 : end].contiguous())  # type: ignore[arg-type]
    assert torch.equal(got, whole[begin + 35 : end])
