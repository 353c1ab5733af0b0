"""Attention for training: many texts end to end in one row of tokens, none of which sees another."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels.training import reference_attention
from trimtab.kernels.training.library import native


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Softmax attention within each segment, `[N, H, d]`, with a gradient for q, k and v.

    Args:
        q: `[N, H, d]` queries before rotary embedding; k and v `[N, G, d]`, where G divides H.
        cos: `[N, d / 2]` float32 of each row's angles, as is sin.
        bounds: int64 `[S + 1]` on the CPU, ascending from 0 to N: segment s has the rows
            `bounds[s]` to `bounds[s + 1]`. A segment may be empty.
        causal: a row sees itself and earlier rows only.
        window: a row sees rows less than this many places away; None is all of its segment.

    In float32 on the CPU, with a head size divisible by 16, this is one C++ operator whose results do not
    depend on the number of threads. Elsewhere torch does it.
    """
    if int(bounds[0]) != 0 or int(bounds[-1]) != q.shape[0] or bool((bounds.diff() < 0).any()):
        raise AssertionError(f"bounds {bounds.tolist()} do not cut {q.shape[0]} rows into segments")
    lib = native(q, k, v, cos, sin)
    if lib is None or q.shape[-1] % 16 or q.numel() == 0:
        return reference_attention.packed_attention(q, k, v, cos, sin, bounds, causal, window)
    return _PackedAttention.apply(q, k, v, cos, sin, bounds, causal, window, lib)  # type: ignore[return-value]


class _Packed(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("N", "S", "H", "G", "d", "causal", "window")],
        *[(name, c_void_p) for name in ("bounds", "cos", "sin", "q", "k", "v")],
        *[(name, c_void_p) for name in ("rotated_q", "rotated_k", "out", "lse")],
    ]


class _PackedGradient(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("d_out", "d_q", "d_k", "d_v")]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        bounds: Tensor,
        causal: bool,
        window: int | None,
        lib: Any,
    ) -> Tensor:
        q, k, v, cos, sin, bounds = (x.contiguous() for x in (q, k, v, cos, sin, bounds))
        rows, heads, d = q.shape
        rotated_q, rotated_k = q.new_empty(heads, rows, d), q.new_empty(k.shape[1], rows, d)
        out, lse = torch.empty_like(q), q.new_empty(heads, rows)
        ctx.settings = (bool(causal), window or 0)
        ctx.lib = lib
        ctx.save_for_backward(bounds, cos, sin, v, rotated_q, rotated_k, out, lse)
        call = _call(ctx.settings, q, k, bounds, cos, sin, v, rotated_q, rotated_k, out, lse)
        lib.tt_packed_forward(ctypes.byref(call), torch.get_num_threads())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_out = d_out.contiguous()
        saved = ctx.saved_tensors  # once: where activations are recomputed they may be taken only once
        v = saved[3]
        d_q, d_k, d_v = torch.empty_like(d_out), torch.empty_like(v), torch.empty_like(v)
        gradient = _PackedGradient(*(x.data_ptr() for x in (d_out, d_q, d_k, d_v)))
        call = _call(ctx.settings, None, None, *saved)
        ctx.lib.tt_packed_backward(ctypes.byref(call), ctypes.byref(gradient), torch.get_num_threads())
        return d_q, d_k, d_v, None, None, None, None, None, None


def _call(
    settings: tuple[bool, int],
    q: Tensor | None,
    k: Tensor | None,
    bounds: Tensor,
    cos: Tensor,
    sin: Tensor,
    v: Tensor,
    *kept: Tensor,
) -> _Packed:
    """The C++ call; the backward pass has no use for q and k as they were before rotation."""
    heads, rows, d = kept[0].shape
    addresses = (None if x is None else x.data_ptr() for x in (bounds, cos, sin, q, k, v, *kept))
    return _Packed(rows, len(bounds) - 1, heads, v.shape[1], d, *settings, *addresses)
