"""The output head with its cross entropy: against torch, with rows left out, and in little memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trimtab.kernels.training import cross_entropy, library
from trimtab.kernels.training.cross_entropy import linear_cross_entropy


def made(rows: int, size: int, vocab: int, dtype=torch.float32):
    draw = torch.Generator().manual_seed(rows + vocab)
    hidden = torch.randn(rows, size, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, size, generator=draw, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=draw)
    return hidden, weight, targets, torch.rand(rows, generator=draw, dtype=dtype) + 0.1


def plain(hidden, weight, targets, weights, z_loss):
    """The same in float64 with all logits at once."""
    logits = hidden.double() @ weight.double().T
    nll = functional.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    nll = nll * ((targets >= 0) & (weights != 0))
    kept = (targets >= 0).double() * weights.double()
    return (kept * (nll + z_loss * logits.logsumexp(-1) ** 2)).sum(), nll.detach()


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of doing it, with chunks so small that there are several."""
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 16)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4096)
    if request.param == "torch":
        monkeypatch.setattr(cross_entropy, "native", lambda *tensors: None)
    elif library.library() is None:
        pytest.skip("no C++ compiler on this machine")


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("rows,vocab,z_loss", [(70, 50, 0.0), (33, 7, 0.02), (1, 1, 0.1), (16, 160, 1e-4)])
def test_loss_and_gradients(way, rows: int, vocab: int, z_loss: float, left_out: bool) -> None:
    hidden, weight, targets, weights = made(rows, 24, vocab)
    if left_out:
        targets[::3] = -100
        weights[1::5] = 0
    loss, nll = linear_cross_entropy(hidden, weight, targets, weights, z_loss)
    true, true_nll = plain(hidden, weight, targets, weights, z_loss)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nll.double(), true_nll, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(mine, torch.autograd.grad(3 * true, (hidden, weight)), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-6


def test_gradcheck() -> None:
    hidden, weight, targets, weights = made(5, 3, 4, torch.float64)
    targets[2] = -1
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, weights, 0.1)[0], (hidden, weight), fast_mode=True
    )


def test_rows_left_out_are_not_looked_at(way) -> None:
    hidden, weight, targets, weights = made(20, 8, 30)
    weights[3], targets[4] = 0, -1
    with torch.no_grad():
        hidden[3:5] = torch.nan
    loss, nll = linear_cross_entropy(hidden, weight, targets, weights)
    loss.backward()
    assert loss.isfinite() and nll.isfinite().all() and weight.grad.isfinite().all()
    assert (hidden.grad[3:5] == 0).all() and (nll[3:5] == 0).all()


def test_nothing_to_train(way) -> None:
    hidden, weight, targets, weights = made(6, 8, 30)
    loss, nll = linear_cross_entropy(hidden, weight, targets - 100, weights)
    loss.backward()
    assert loss == 0 and (nll == 0).all() and (weight.grad == 0).all() and (hidden.grad == 0).all()


def test_no_gradients_are_formed_where_none_are_wanted(way, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, weights = made(40, 8, 30)
    true, _ = plain(hidden, weight, targets, weights, 0.0)
    monkeypatch.setattr(cross_entropy, "_add_product_", lambda *x: pytest.fail("a gradient was formed"))
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets, weights)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
    frozen, _ = linear_cross_entropy(hidden, weight.detach(), targets, weights)
    (gradient,) = torch.autograd.grad(frozen, hidden)
    assert gradient.shape == hidden.shape


def test_bfloat16_under_autocast() -> None:
    hidden, weight, targets, weights = made(40, 16, 30)
    true, _ = plain(hidden, weight, targets, weights, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, nll = linear_cross_entropy(hidden.bfloat16(), weight, targets, weights)
    assert loss.dtype == nll.dtype == torch.float32
    assert abs(loss - true) < 0.02 * true
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    assert d_weight.dtype == torch.float32
    for a, b in zip((d_hidden, d_weight), torch.autograd.grad(true, (hidden, weight)), strict=True):
        assert (a - b).abs().max() < 0.03 * b.abs().max()


def test_a_target_beyond_the_vocabulary() -> None:
    hidden, weight, targets, weights = made(4, 8, 30)
    targets[1] = 30
    with pytest.raises(AssertionError, match="target 30"):
        linear_cross_entropy(hidden, weight, targets, weights)
