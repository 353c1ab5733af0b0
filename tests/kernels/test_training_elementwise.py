"""RMSNorm and SwiGLU for training against torch in float64, and where the model uses them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trimtab.kernels.training import elementwise
from trimtab.kernels.training.elementwise import rms_norm, swiglu
from trimtab.kernels.training.library import library
from trimtab.models.shapes import random_model, shape


@pytest.fixture(autouse=True)
def compiled() -> None:
    if library() is None:
        pytest.skip("no C++ compiler on this machine")


def drawn(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def assert_same(out: torch.Tensor, true: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    g = drawn(*out.shape, 1).squeeze(-1)
    assert out.grad_fn is not None and "Backward" in type(out.grad_fn).__name__
    torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(out, inputs, g)
    for a, b in zip(mine, torch.autograd.grad(true, inputs, g.double()), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("sizes", [(1, 16), (7, 48), (150, 64), (3, 4, 32)])
def test_rms_norm(sizes: tuple[int, ...]) -> None:
    x, weight = drawn(*sizes).requires_grad_(), drawn(sizes[-1]).requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    assert type(out.grad_fn).__name__ == "_RMSNormBackward"
    assert_same(out, functional.rms_norm(x.double(), (sizes[-1],), weight.double(), 1e-5), [x, weight])


@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (3, 16), (300, 65)])
def test_swiglu(sizes: tuple[int, ...]) -> None:
    gate, up = (6 * drawn(*sizes)).requires_grad_(), drawn(*sizes, 1).squeeze(-1).requires_grad_()
    out = swiglu(gate, up)
    assert type(out.grad_fn).__name__ == "_SwiGLUBackward"
    assert_same(out, functional.silu(gate.double()) * up.double(), [gate, up])


def test_extreme_gates() -> None:
    gate = torch.tensor([-200.0, -88.0, 0.0, 88.0, 200.0, torch.inf, torch.nan])
    up = torch.ones(7)
    torch.testing.assert_close(swiglu(gate.requires_grad_(), up), functional.silu(gate) * up, equal_nan=True)


def test_rows_that_are_not_contiguous() -> None:
    x = drawn(32, 5).T.requires_grad_()
    weight = drawn(32).requires_grad_()
    assert_same(rms_norm(x, weight, 1e-6), functional.rms_norm(x.double(), (32,), weight.double(), 1e-6), [x])


def test_the_number_of_threads_changes_no_bit() -> None:
    x, weight = drawn(300, 32).requires_grad_(), drawn(32).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), (x, weight)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_types_and_widths_are_torchs_business() -> None:
    x = drawn(4, 10).requires_grad_()
    assert "_RMSNorm" not in type(rms_norm(x, drawn(10), 1e-5).grad_fn).__name__
    assert swiglu(x.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
    assert swiglu(x.double(), x.double()).dtype == torch.float64


def test_the_model_uses_them_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=40)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16)
    model = random_model(shape("125m", **sizes, **heads)).float().requires_grad_(True)
    ids = torch.arange(12).view(1, 12)
    fused = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))
    monkeypatch.setattr(elementwise, "native", lambda *x: None)
    plain = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(elementwise, "native", lambda *x: pytest.fail("inference has its own kernels"))
    with torch.no_grad():
        model(ids)
