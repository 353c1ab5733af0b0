"""A linear layer with a low-rank update beside its weight."""

from __future__ import annotations

import math

import torch
from torch import nn

from trimtab.models.lora.settings import LoraSettings


class LoraLinear(nn.Linear):
    """`x W' + scale * x A' B'`, in place of the layer whose weight and bias it takes over.

    `lora_A[rank, in]` begins uniform and `lora_B[out, rank]` zero, so that the layer begins as it was. Both
    are float32 whatever the weight is; the update is added in the type of the layer's result.

    Attributes:
        active: whether the update counts.
        base_weight: while merged, the weight as it was; else None.
    """

    def __init__(self, linear: nn.Linear, settings: LoraSettings, generator: torch.Generator) -> None:
        nn.Module.__init__(self)  # the parent's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = settings.scale
        self.dropout = nn.Dropout(settings.dropout)
        self.active = True
        self.base_weight: torch.Tensor | None = None
        device, rank = linear.weight.device, settings.rank
        bound = 1 / math.sqrt(self.in_features)
        first = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(first.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    @property
    def merged(self) -> bool:
        """Whether the weight holds the update."""
        return self.base_weight is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = nn.functional.linear(x, self.weight, self.bias)
        if self.merged or not self.active:
            return out
        low = nn.functional.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)
        return out + (nn.functional.linear(low, self.lora_B) * self.scale).to(out.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into the weight; the weight as it was is kept beside it."""
        if self.base_weight is None:
            update = (self.lora_B.float() @ self.lora_A.float()) * self.scale
            self.base_weight = self.weight.data
            self.weight.data = (self.base_weight.float() + update).to(self.base_weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight as it was, bit for bit."""
        if self.base_weight is not None:
            self.weight.data = self.base_weight
            self.base_weight = None

    def plain(self) -> nn.Linear:
        """An ordinary layer with the weight and bias as they are now."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)
