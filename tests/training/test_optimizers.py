"""Muon, AdamW and the schedule against formulas by hand and torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.training.optimizers import muon
from trimtab.training.optimizers.build import build_optimizers, load_state_tensors, state_tensors
from trimtab.training.optimizers.muon import Muon, orthogonalize
from trimtab.training.optimizers.schedule import Schedule
from trimtab.training.recipe import OptimizerSettings


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


class Net(nn.Module):
    """One parameter of each kind, under the names that a model has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.up_proj = nn.Linear(6, 9)
        self.experts = nn.Parameter(torch.randn(2, 6, 6))
        self.lm_head = nn.Linear(6, 11, bias=False)

    def give_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


@pytest.mark.parametrize("shape", [(3, 48, 32), (2, 32, 48), (1, 40, 40)])
def test_singular_values_near_one_and_vectors_kept(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    made = orthogonalize(matrices)
    values = torch.linalg.svdvals(made)
    square = shape[1] == shape[2]  # a square matrix has singular values of nearly nothing, which stay below
    assert values.max() < 1.2 and values.flatten().sort().values[2 if square else 0] > 0.65
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    within = u.mT @ made @ vh.mT
    torch.testing.assert_close(within, torch.diag_embed(within.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)


def test_muon_step_is_momentum_orthogonalized_scaled_and_decayed() -> None:
    weights = parameters((8, 4), (4, 8), (8, 4))
    before = [w.detach().clone() for w in weights]
    optimizer = Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.5)
    running = [torch.zeros_like(w) for w in weights]
    for _ in range(2):
        for i, w in enumerate(weights):
            assert w.grad is not None
            running[i] = 0.9 * running[i] + 0.1 * w.grad
            ahead = 0.1 * w.grad + 0.9 * running[i]
            update = orthogonalize(ahead.unsqueeze(0))[0]
            before[i] = before[i] * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 8**0.5 * update
        optimizer.step()
    for weight, expected, momentum in zip(weights, before, running, strict=True):
        torch.testing.assert_close(weight.detach(), expected)
        torch.testing.assert_close(optimizer.state[weight]["momentum"], momentum)


def test_muon_in_small_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    once, pieces = parameters(*[(6, 5)] * 5), parameters(*[(6, 5)] * 5)
    Muon(once).step()
    monkeypatch.setattr(muon, "_AT_ONCE", 61)
    Muon(pieces).step()
    for a, b in zip(once, pieces, strict=True):
        torch.testing.assert_close(a, b)


def test_what_goes_to_which_optimizer() -> None:
    adamw, second = build_optimizers(net(), OptimizerSettings(name="muon"))
    assert isinstance(second, Muon)
    assert [p.shape for g in second.param_groups for p in g["params"]] == [(9, 6)]
    tables, vectors = adamw.param_groups
    assert {tuple(p.shape) for p in tables["params"]} == {(11, 6), (2, 6, 6)}
    assert len(tables["params"]) == 3 and tables["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in vectors["params"]] == [(9,)] and vectors["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out() -> None:
    module = net()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == "up_proj.weight")
    (only,) = build_optimizers(module, OptimizerSettings(name="muon"))
    assert isinstance(only, Muon)
    (only,) = build_optimizers(module, OptimizerSettings(name="adamw"))
    assert isinstance(only, torch.optim.AdamW)


def test_adamw_equals_torchs_one_by_one() -> None:
    ours, theirs = net(), net()
    (optimizer,) = build_optimizers(ours, OptimizerSettings(name="adamw", lr=0.01, weight_decay=0.3))
    plain = [
        torch.optim.AdamW(
            [p], lr=0.01, betas=(0.9, 0.95), weight_decay=0.3 if p.dim() > 1 else 0, foreach=False
        )
        for p in theirs.parameters()
    ]
    for step in range(3):
        ours.give_gradients(step)
        theirs.give_gradients(step)
        optimizer.step()
        for each in plain:
            each.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_state_tensors_let_another_go_on_bit_for_bit() -> None:
    first = net()
    optimizers = build_optimizers(first, OptimizerSettings())
    first.give_gradients(0)
    for optimizer in optimizers:
        optimizer.step()
    kept = state_tensors(first, optimizers)
    assert "optimizer.up_proj.weight.momentum" in kept and "optimizer.lm_head.weight.exp_avg_sq" in kept
    kept = {name: value.clone() for name, value in kept.items()}

    second = net()
    second.load_state_dict(first.state_dict())
    others = build_optimizers(second, OptimizerSettings())
    load_state_tensors(second, others, kept)
    for module, owned in ((first, optimizers), (second, others)):
        module.give_gradients(1)
        for optimizer in owned:
            optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Schedule(warmup=2, decay=4), [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (Schedule(warmup=0.2, decay=0.4, final=0.5), [0.5, 1, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6]),
        (Schedule(warmup=0, decay=0), [1] * 10),
        (Schedule(warmup=2, decay=1.0), [0.5, 1, *((10 - step) / 9 for step in range(2, 10))]),
        (Schedule(warmup=20, decay=4), [(step + 1) / 20 for step in range(10)]),
        (Schedule(warmup=0, decay=3, shape="sqrt"), [1] * 7 + [0.5, 1 - 0.5**0.5, 1 - 0.75**0.5]),
        (Schedule(warmup=0, decay=2, shape="cosine"), [1] * 8 + [0.75, 0.25]),
    ],
)
def test_schedule_factors(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule.factor(step, 10) for step in range(10)] == pytest.approx(expected)
