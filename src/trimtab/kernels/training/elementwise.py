"""RMSNorm and SwiGLU as one pass over memory each way, with little kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trimtab.kernels.training.library import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension of `x[..., D]` (arXiv 1910.07467)."""
    lib = native(x, weight)
    if lib is None or x.shape[-1] % 16:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps, lib)  # type: ignore[return-value]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of two tensors of one shape (arXiv 2002.05202)."""
    lib = native(gate, up)
    if lib is None or gate.shape != up.shape:
        return functional.silu(gate) * up
    return _SwiGLU.apply(gate, up, lib)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, lib: Any) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        size = weight.numel()
        rows = x.numel() // size
        y, inverse = torch.empty_like(x), x.new_empty(rows)
        lib.tt_rms_forward(
            x.data_ptr(),
            weight.data_ptr(),
            rows,
            size,
            eps,
            y.data_ptr(),
            inverse.data_ptr(),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x, weight, inverse)
        ctx.lib = lib
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        d_y = d_y.contiguous()
        d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
        ctx.lib.tt_rms_backward(
            x.data_ptr(),
            weight.data_ptr(),
            inverse.data_ptr(),
            d_y.data_ptr(),
            inverse.numel(),
            weight.numel(),
            d_x.data_ptr(),
            d_weight.data_ptr(),
            torch.get_num_threads(),
        )
        return d_x, d_weight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, lib: Any) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        lib.tt_swiglu_forward(
            gate.data_ptr(), up.data_ptr(), y.numel(), y.data_ptr(), torch.get_num_threads()
        )
        ctx.save_for_backward(gate, up)
        ctx.lib = lib
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_y = d_y.contiguous()
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        ctx.lib.tt_swiglu_backward(
            gate.data_ptr(),
            up.data_ptr(),
            d_y.data_ptr(),
            d_y.numel(),
            d_gate.data_ptr(),
            d_up.data_ptr(),
            torch.get_num_threads(),
        )
        return d_gate, d_up, None
