"""Attention for training: many texts end to end in one row of tokens, none of which sees another."""

from __future__ import annotations

from torch import Tensor

from trimtab.kernels.training import reference_attention


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
        cos: `[N, d / 2]` float32 angles of each row, as is sin.
        bounds: int64 `[S + 1]` on the CPU, ascending from 0 to N: segment s has the rows
            `bounds[s]` to `bounds[s + 1]`. A segment may be empty.
        causal: a row sees itself and earlier rows only.
        window: a row sees rows less than this many places away; None is all of its segment.
    """
    return reference_attention.packed_attention(q, k, v, cos, sin, bounds, causal, window)
