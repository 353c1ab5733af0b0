"""Joining segments of attention by their logsumexp gives the attention over all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.libraries import native_kernels
from trimtab.kernels.reference import TorchKernels, merge_segments


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [N, H, d], logsumexp [N, H]) of q [N, H, d] over k, v [T, H, d]; nothing at all where T = 0."""
    scores = torch.einsum("nhd,thd->nht", q, k)
    lse = scores.logsumexp(-1) if len(k) else torch.full(q.shape[:2], -torch.inf)
    return torch.einsum("nht,thd->nhd", scores.softmax(-1), v), lse


@pytest.mark.parametrize("lengths", [(9,), (5, 4), (0, 9), (9, 0), (1, 0, 8), (3, 200, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_merged_is_the_whole(lengths: tuple[int, ...], size: float) -> None:
    total = sum(lengths)
    q, k, v = torch.randn(6, 3, 8) * size, torch.randn(total, 3, 8), torch.randn(total, 3, 8)
    cuts = torch.tensor((0, *lengths)).cumsum(0).tolist()
    parts = [attention(q, k[a:b], v[a:b]) for a, b in pairwise(cuts)]
    out, lse = merge_segments([o for o, _ in parts], [z for _, z in parts])
    true_out, true_lse = attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), true_out, atol=2e-6 * size, rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-6 * size, rtol=1e-6, check_dtype=False)


def test_one_segment_and_empty_ones_keep_the_bits() -> None:
    out, lse = torch.randn(4, 2, 8), torch.randn(4, 2) * 50
    nothing, empty = torch.zeros(4, 2, 8), torch.full((4, 2), -torch.inf)
    for outs, lses in (([out], [lse]), ([out, nothing], [lse, empty]), ([nothing, out], [empty, lse])):
        merged = merge_segments(outs, lses)
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)


def test_merging_is_associative_and_in_float32() -> None:
    parts = [(torch.randn(4, 2, 8).bfloat16(), torch.randn(4, 2) * 10) for _ in range(3)]
    outs, lses = [o for o, _ in parts], [z for _, z in parts]
    whole = merge_segments(outs, lses)
    first = merge_segments(outs[:2], lses[:2])
    nested = merge_segments([first[0], outs[2]], [first[1], lses[2]])
    assert whole[0].dtype == torch.float32
    torch.testing.assert_close(nested[0], whole[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(nested[1], whole[1])


def test_rows_may_have_different_empty_segments() -> None:
    lses = [
        torch.tensor([[0.0], [-torch.inf], [-torch.inf]]),
        torch.tensor([[-torch.inf], [3.0], [-torch.inf]]),
    ]
    outs = [torch.full((3, 1, 2), 1.0), torch.full((3, 1, 2), 2.0)]
    out, lse = merge_segments(outs, lses)
    assert out[:, 0, 0].tolist() == [1.0, 2.0, 0.0]
    assert lse[:, 0].tolist() == [0.0, 3.0, -torch.inf]


def test_the_kernels_merge_as_the_reference_does() -> None:
    """Three segments, of which some are empty in some places and all in one."""
    outs = [torch.randn(5, 4, 32) for _ in range(3)]
    lses = [torch.randn(5, 4) * 20 for _ in range(3)]
    lses[1][2] = lses[0][3, 1] = lses[2][:, 0] = -torch.inf
    for out, lse in zip(outs, lses, strict=True):
        lse[4, 3] = -torch.inf
        out[lse == -torch.inf] = 0
    expected = TorchKernels().merge([(o.clone(), z.clone()) for o, z in zip(outs, lses, strict=True)])
    got = native_kernels().merge([(o.clone(), z.clone()) for o, z in zip(outs, lses, strict=True)])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert not got[4, 3].any()
