"""Muon: momentum whose singular values are all made about equal (Jordan et al. 2024).

The update of a matrix is its Nesterov momentum, brought near to the closest semi-orthogonal matrix by five
Newton-Schulz steps. It is scaled by 0.2 sqrt(max(rows, columns)), which makes its root mean square that
of an AdamW update, so one learning rate and one weight decay fit both (Liu et al. 2025, arXiv 2502.16982).

Where matrices are sharded over processes, each is put together whole, orthogonalised by one of them, and
handed out again: an update needs all of its matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from trimtab.training.distributed.sharded import cut, is_sharded, joined, local

# The quintic of Jordan et al.: steep at zero, so small singular values grow fast; it brings them to
# 0.68 to 1.14 and not to 1, which does not matter.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_AT_ONCE = 1 << 26  # elements of the matrices that go through the products together: they are copied


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices `[n, r, c]` with the same singular vectors and singular values near 1."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For the two-dimensional hidden matrices only; embeddings, heads and vectors belong to AdamW.

    Args:
        momentum: of the running mean of gradients, with Nesterov's look ahead.
        weight_decay: decoupled: each step shrinks the weights by `lr * weight_decay`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        steps: int = 5,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        if closure is not None:
            raise AssertionError("Muon takes no closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                count = max(1, _AT_ONCE // shape.numel())
                for begin in range(0, len(parameters), count):
                    self._update(parameters[begin : begin + count], shape, group)

    def _update(self, parameters: list[Parameter], shape: torch.Size, group: dict[str, Any]) -> None:
        """Equal shapes go through the matrix products together."""
        ahead = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            gradient, momentum = local(parameter.grad), local(state["momentum"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            ahead.append(torch.lerp(gradient, momentum, group["momentum"]))
        updates = _orthogonal(parameters, ahead, group["steps"])
        rate = group["lr"] * 0.2 * max(shape) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            weight = local(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-rate)


def _orthogonal(parameters: list[Parameter], ahead: list[Tensor], steps: int) -> list[Tensor]:
    """What `orthogonalize` makes of the matrices; `ahead` and the result are this process's parts of them."""
    like = parameters[0]
    if not is_sharded(like):
        return list(orthogonalize(torch.stack(ahead), steps))
    matrices = [joined(part, like) for part in ahead]
    group = like.device_mesh.get_group()  # type: ignore[attr-defined]
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    each = -(-len(matrices) // world)
    mine = matrices[rank * each : (rank + 1) * each]
    made = torch.zeros_like(matrices[0]).repeat(each, 1, 1)
    if mine:
        made[: len(mine)] = orthogonalize(torch.stack(mine), steps)
    everyones = [torch.empty_like(made) for _ in range(world)]
    dist.all_gather(everyones, made, group=group)
    return [local(cut(matrix, like)) for matrix in torch.cat(everyones)[: len(matrices)]]
