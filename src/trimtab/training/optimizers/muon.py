"""Muon: momentum whose singular values are all made about equal (Jordan et al. 2024).

The update of a matrix is its Nesterov momentum, brought near to the closest semi-orthogonal matrix by five
Newton-Schulz steps. It is scaled by 0.2 sqrt(max(rows, columns)), which makes its root mean square that
of an AdamW update, so one learning rate and one weight decay fit both (Liu et al. 2025, arXiv 2502.16982).
"""

from __future__ import annotations

import torch

# The quintic of Jordan et al.: steep at zero, so small singular values grow fast; it brings them to
# 0.7 to 1.2 and not to 1, which does not matter.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices `[n, r, c]` with the same singular vectors and singular values near 1."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For the two-dimensional hidden matrices only; embeddings, heads and vectors belong to AdamW.

    Args:
        momentum: of the running sum of gradients, with Nesterov's look ahead.
        weight_decay: decoupled: each step shrinks the weights by `lr * weight_decay`.
    """

    def __init__(
        self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1, steps: int = 5
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        if closure is not None:
            raise AssertionError("Muon takes no closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group)

    def _update(self, parameters: list[torch.nn.Parameter], shape: torch.Size, group: dict) -> None:
        """Equal shapes go through the matrix products together."""
        ahead = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"]
            momentum.lerp_(parameter.grad, 1 - group["momentum"])
            ahead.append(torch.lerp(parameter.grad, momentum, group["momentum"]))
        updates = orthogonalize(torch.stack(ahead), group["steps"])
        rate = group["lr"] * 0.2 * max(shape) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-rate)
