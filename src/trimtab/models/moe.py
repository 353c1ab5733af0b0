"""Mixture of experts: a router picks a few experts for each token, and only those are computed."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.models.config import MoEConfig


class Expert(nn.Module):
    """One gated feed-forward expert, its projections under the checkpoint's names."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self._names = (moe.gate_name, moe.up_name, moe.down_name)
        inner = moe.intermediate_size
        for name, sizes in zip(
            self._names, ((hidden_size, inner), (hidden_size, inner), (inner, hidden_size)), strict=True
        ):
            self.add_module(name, nn.Linear(*sizes, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.get_submodule(name) for name in self._names)
        return down(nn.functional.silu(gate(x)) * up(x))


class SparseMLP(nn.Module):
    """The experts of one layer and their router."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.gate = nn.Linear(hidden_size, moe.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden_size, moe) for _ in range(moe.num_experts))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x[N, D]` to the chosen experts `[N, k]` and their weights `[N, k]` float32."""
        shares = self.gate(x).float().softmax(-1)
        weights, chosen = shares.topk(self.moe.experts_per_token, dim=-1)
        if self.moe.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x[N, D]` to `[N, D]`."""
        chosen, weights = self.route(x)
        count = self.moe.experts_per_token
        # Visits sorted by expert, so that each expert's rows are one slice; `order` leads back.
        order = chosen.flatten().argsort(stable=True)
        rows = x[order // count]
        visits = torch.bincount(chosen.flatten(), minlength=self.moe.num_experts).tolist()
        parts = [
            expert(part)
            for expert, part in zip(self.experts, rows.split(visits), strict=True)
            if part.shape[0]
        ]
        # Summed in the order of a token's own choices, whatever other tokens are in the batch.
        results = torch.empty_like(rows).index_copy(0, order, torch.cat(parts)) if parts else rows
        return (results.unflatten(0, (x.shape[0], count)).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)
