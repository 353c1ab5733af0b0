"""Layers whose matrix is int8 with one float32 factor a row: the weight is about `code * scale[row]`.

Here they run in plain torch, on any device: the codes become numbers of the model's type for the length of
one product, which is exact, and the factor is applied in float32. Nothing of them is kept, so memory stays
small and a step reads codes and writes and reads their wide copies. The C++ kernels read the codes only.
"""

from __future__ import annotations

import torch
from torch import nn

# Codes times this are at most 1, so that sums over a row stay far from float16's largest number.
_UNIT = 2.0**-7


def _product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x[..., K]` times the matrix `[N, K]`, transposed, in float32."""
    y = nn.functional.linear(x, codes.to(x.dtype) * _UNIT)
    return y.float() * (scale / _UNIT)


class QuantizedLinear(nn.Module):
    """`nn.Linear` with int8 `weight[N, K]` and float32 `scale[N]`; the bias stays as it is."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(outputs, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _product(x, self.weight, self.scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` with int8 `weight[V, D]` and float32 `scale[V]`, giving rows of type `dtype`."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", torch.empty(rows, width, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(rows, dtype=torch.float32))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return (self.weight[tokens] * self.scale[tokens, None]).to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head of a model that ties it to the embedding: `[..., D]` to `[..., V]`."""
        return _product(hidden, self.weight, self.scale).to(hidden.dtype)
