"""Attention to shared beginnings: the bits of attending alone, the published merge, and what is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.libraries import DTYPES, native_kernels
from trimtab.kernels.native import Library
from trimtab.kernels.paged import PAGE, PagedRows
from trimtab.kernels.reference import TorchKernels, merge_segments

SUPER = 512
D, KV_HEADS = 32, 2

# A text: (pages shared from another text, named by its number or None; tokens held; new rows).
Text = tuple[int | None, int, int, int]
BATCHES: dict[str, list[Text]] = {
    "nothing shared": [(None, 0, 700, 1), (None, 0, 700, 1)],
    "one beginning": [(None, 0, 1100, 1), (0, 1024, 1030, 1), (0, 1024, 1200, 1)],
    "many rows": [(None, 0, 600, 1)] + [(0, 512, 520 + i, 1) for i in range(19)],
    "empty suffix": [(None, 0, 1024, 1), (0, 1024, 1024, 1)],
    "ragged": [(None, 0, 1600, 1), (0, 1024, 1100, 1), (0, 512, 900, 1), (0, 512, 530, 1)],
    "a tree of three levels": [
        (None, 0, 1700, 1),
        (0, 1536, 1540, 1),
        (0, 1024, 1600, 1),
        (2, 1536, 1590, 1),
        (0, 512, 700, 1),
    ],
    "two trees": [(None, 0, 600, 1), (None, 0, 1200, 1), (1, 1024, 1030, 1), (0, 512, 512, 1)],
    "a prompt's chunk among them": [(None, 0, 1030, 1), (0, 1024, 1024, 37), (0, 512, 900, 1)],
    "less than a superblock": [(None, 0, 500, 1), (0, 496, 500, 1)],
    "a text without new rows": [(None, 0, 600, 1), (0, 512, 600, 0), (0, 512, 540, 2)],
}


def make(texts: list[Text], dtype: torch.dtype, heads: int = 4) -> tuple[PagedRows, torch.Tensor]:
    """Held rows are random; new ones are written by the caller's choice of queries only."""
    g = torch.Generator().manual_seed(1)
    width = max(held + new for _, _, held, new in texts) // PAGE + 1
    table = torch.randperm(len(texts) * width, generator=g).int().view(len(texts), width)
    for i, (other, shared, _, _) in enumerate(texts):
        if other is not None:
            table[i, : shared // PAGE] = table[other, : shared // PAGE]
    ends = torch.tensor([new for *_, new in texts]).cumsum(0).tolist()
    spans = [[i, end - t[3], end] for i, (t, end) in enumerate(zip(texts, ends, strict=True)) if t[3]]
    arena = torch.randn(len(texts) * width * KV_HEADS * 2 * PAGE * D, generator=g).to(dtype)
    rows = PagedRows(
        arena=arena,
        table=table,
        start=torch.tensor([t[2] for t in texts], dtype=torch.int32),
        spans=torch.tensor(spans, dtype=torch.int32),
        num_heads=heads,
        num_kv_heads=KV_HEADS,
        head_dim=D,
        scale=D**-0.5,
        table_seq=width,
        start_seq=1,
        page_mul=KV_HEADS,
        page_head=1,
        share=True,
    )
    return rows, torch.randn(ends[-1], heads, D, generator=g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize("name", BATCHES)
def test_sharing_does_not_change_a_bit(name: str, heads: int, dtype: torch.dtype) -> None:
    rows, q = make(BATCHES[name], dtype, heads)
    for threads in (1, 3):
        kernels = Library(dtype, threads) if threads > 1 else native_kernels(dtype)
        together, alone = kernels.attend(rows, q), kernels.attend(replace(rows, share=False), q)
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    true = TorchKernels().attend(rows, q)
    for a, b in zip(together, true, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_it_is_the_published_merge_of_segments() -> None:
    """Prefix without a causal mask for all queries at once, suffixes alone, merged by their logsumexps."""
    rows, q = make(BATCHES["one beginning"], torch.float32)
    kernels = native_kernels(torch.float32)
    prefix = replace(
        rows,
        spans=torch.tensor([[0, 0, len(q)]], dtype=torch.int32),
        start=torch.tensor([1024 - len(q)], dtype=torch.int32),
        causal_new=False,
    )
    suffix = replace(rows, table=rows.table[:, 1024 // PAGE :].contiguous(), start=rows.start - 1024)
    suffix.table_seq = suffix.table.shape[1]
    parts = [kernels.attend(prefix, q), kernels.attend(suffix, q)]
    merged, lse = merge_segments([out for out, _ in parts], [z for _, z in parts])
    out, true_lse = kernels.attend(rows, q)
    torch.testing.assert_close(merged, out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, true_lse, atol=1e-6, rtol=1e-5)


def test_shared_keys_are_read_once() -> None:
    kernels = native_kernels(torch.float32)

    def shared(name: str) -> tuple[list[int], int]:
        begun, keys = kernels.shared(make(BATCHES[name], torch.float32)[0])
        return begun.tolist(), keys

    held = [1100, 1030, 1200]
    assert shared("one beginning") == ([1024] * 3, 1024 + sum(h - 1024 for h in held))
    held = [1700, 1540, 1600, 1590, 700]
    begun = [1536, 1536, 1536, 1536, 512]
    # One run of all, one of four, two of two.
    runs = 512 + 512 + 2 * 512
    assert shared("a tree of three levels") == (
        begun,
        runs + sum(h - b for h, b in zip(held, begun, strict=True)),
    )
    assert shared("nothing shared") == ([0, 0], 1400)
    assert shared("less than a superblock") == ([0, 0], 1000)


def test_windows_and_head_tables_are_left_alone() -> None:
    kernels = native_kernels(torch.float32)
    rows, q = make(BATCHES["one beginning"], torch.float32)
    windowed = replace(rows, window=300)
    assert torch.equal(kernels.attend(windowed, q)[0], kernels.attend(replace(windowed, share=False), q)[0])
    by_head = replace(
        rows,
        head_window=torch.tensor([0, 40], dtype=torch.int32),
        head_sinks=torch.zeros(2, dtype=torch.int32),
    )
    assert kernels.shared(by_head)[0].tolist() == [0, 0, 0]
