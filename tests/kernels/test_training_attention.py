"""Packed attention for training: values and gradients against torch in float64, and what must not leak."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from trimtab.kernels.training import reference_attention
from trimtab.kernels.training.attention import packed_attention
from trimtab.kernels.training.library import library

LENGTHS = ([1], [7], [65], [1, 0, 7, 65, 97, 96], [200])


def made(lengths: list[int], heads: int = 4, kv_heads: int = 2, d: int = 16, dtype=torch.float32):
    """q, k, v, cos, sin, bounds and a gradient of the result, the same at every call."""
    draw = torch.Generator().manual_seed(sum(lengths) * heads + d)
    rows = sum(lengths)
    q, k, v, g = (
        torch.randn(rows, h, d, generator=draw, dtype=dtype) for h in (heads, kv_heads, kv_heads, heads)
    )
    angles = 6 * torch.rand(rows, d // 2, generator=draw, dtype=dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return [x.requires_grad_() for x in (q, k, v)], (angles.cos(), angles.sin()), bounds, g


def by_hand(q, k, v, cos, sin, bounds, causal, window) -> Tensor:
    """One segment and head after another, written out, in float64."""
    q, k, v, cos, sin = (x.double() for x in (q, k, v, cos, sin))
    turned = []
    for x in (q, k):
        a, b = x.chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        turned.append(torch.cat((a * c - b * s, b * c + a * s), -1))
    q, k = turned
    group = q.shape[1] // k.shape[1]
    pieces = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        place = torch.arange(end - begin)
        distance = place[:, None] - place
        seen = distance.abs() < (window or end - begin + 1)
        if causal:
            seen &= distance >= 0
        heads = []
        for h in range(q.shape[1]):
            scores = q[begin:end, h] @ k[begin:end, h // group].T / q.shape[-1] ** 0.5
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[begin:end, h // group])
        pieces.append(torch.stack(heads, 1))
    return torch.cat(pieces)


def assert_near(mine: Tensor, true: Tensor) -> None:
    assert (mine.double() - true.double()).abs().max() <= 1e-5 * true.abs().max().clamp(min=0.1)


@pytest.fixture(params=["native", "torch"])
def attention(request: pytest.FixtureRequest):
    if request.param == "torch":
        return reference_attention.packed_attention
    if library() is None:
        pytest.skip("no C++ compiler on this machine")
    return packed_attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values_and_gradients(attention, lengths: list[int], window: int | None, causal: bool) -> None:
    inputs, angles, bounds, g = made(lengths)
    out = attention(*inputs, *angles, bounds, causal, window)
    true = by_hand(*inputs, *angles, bounds, causal, window)
    assert out.dtype == torch.float32 and out.shape == inputs[0].shape
    assert_near(out, true)
    mine = torch.autograd.grad(out, inputs, g)
    for a, b in zip(mine, torch.autograd.grad(true, inputs, g.double()), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("heads,kv_heads,d", [(1, 1, 16), (6, 2, 80), (3, 1, 64), (4, 4, 32)])
def test_head_counts_and_sizes(attention, heads: int, kv_heads: int, d: int) -> None:
    inputs, angles, bounds, g = made([130, 5], heads, kv_heads, d)
    out = attention(*inputs, *angles, bounds)
    true = by_hand(*inputs, *angles, bounds, True, None)
    assert_near(out, true)
    mine = torch.autograd.grad(out, inputs, g)
    for a, b in zip(mine, torch.autograd.grad(true, inputs, g.double()), strict=True):
        assert_near(a, b)


def test_segments_are_isolated(attention) -> None:
    """NaN in one segment leaves the others' values and gradients as they are, bit for bit."""
    inputs, angles, bounds, g = made([40, 110, 30])
    clean = attention(*inputs, *angles, bounds)
    clean_gradients = torch.autograd.grad(clean, inputs, g)
    spoilt = [x.detach().clone() for x in inputs]
    for x in spoilt:
        x[40:150] = torch.nan
        x.requires_grad_()
    out = attention(*spoilt, *angles, bounds)
    others = torch.cat((torch.arange(40), torch.arange(150, 180)))
    assert torch.equal(out[others], clean[others]) and out[40:150].isnan().all()
    for a, b in zip(torch.autograd.grad(out, spoilt, g), clean_gradients, strict=True):
        assert torch.equal(a[others], b[others])


def test_a_packed_text_gets_what_it_gets_alone() -> None:
    if library() is None:
        pytest.skip("no C++ compiler on this machine")
    (q, k, v), (cos, sin), bounds, _ = made([33, 100, 7])
    packed = packed_attention(q, k, v, cos, sin, bounds)
    for begin, end in itertools.pairwise(bounds.tolist()):
        one = slice(begin, end)
        alone = packed_attention(q[one], k[one], v[one], cos[one], sin[one], torch.tensor([0, end - begin]))
        assert torch.equal(packed[one], alone)


def test_the_number_of_threads_changes_no_bit() -> None:
    if library() is None:
        pytest.skip("no C++ compiler on this machine")
    inputs, angles, bounds, g = made([97, 3, 150, 64])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = packed_attention(*inputs, *angles, bounds)
            results.append((out, *torch.autograd.grad(out, inputs, g)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_of_the_torch_way() -> None:
    inputs, angles, bounds, _ = made([3, 1, 2], 2, 1, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: packed_attention(*x, *angles, bounds, window=2), inputs, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_torchs_business(dtype: torch.dtype) -> None:
    inputs, angles, bounds, _ = made([20, 9])
    out = packed_attention(*(x.to(dtype) for x in inputs), *angles, bounds)
    assert out.dtype == dtype
    true = by_hand(*inputs, *angles, bounds, True, None)
    assert (out - true).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 10], [0, 7, 3, 10]])
def test_bounds_that_do_not_fit(bounds: list[int]) -> None:
    inputs, angles, _, _ = made([10])
    with pytest.raises(AssertionError, match="do not cut 10 rows"):
        packed_attention(*inputs, *angles, torch.tensor(bounds))


def test_no_rows() -> None:
    inputs, angles, bounds, _ = made([0, 0])
    out = packed_attention(*inputs, *angles, bounds)
    assert out.shape == (0, 4, 16)
    out.sum().backward()
