"""Attention over packed segments in plain torch: for other devices and types, and where no compiler is."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional


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
    """As `attention.packed_attention`. Segments of one length are attended to as one batch."""
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    lengths = bounds.diff().tolist()
    if len(set(lengths)) == 1:
        whole = (len(lengths), lengths[0])
        q, k, v = (x.unflatten(0, whole) for x in (q, k, v))
        return _attend(q, k, v, causal, window).flatten(0, 1)
    starts = defaultdict(list)
    for start, length in zip(bounds.tolist(), lengths, strict=False):
        starts[length].append(start)
    rows, results = [], []
    for length, begun in starts.items():
        if length == 0:
            continue
        index = torch.tensor(begun)[:, None] + torch.arange(length)
        index = index.flatten().to(q.device)
        batch = [x[index].unflatten(0, (len(begun), length)) for x in (q, k, v)]
        rows.append(index)
        results.append(_attend(batch[0], batch[1], batch[2], causal, window).flatten(0, 1))
    if not rows:
        return torch.zeros_like(q)
    back = torch.cat(rows).argsort()
    return torch.cat(results)[back]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) of `x[N, heads, d]` by its angle, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    """q `[B, T, H, d]`, k and v `[B, T, G, d]`, rotated, to `[B, T, H, d]`."""
    steps = q.shape[1]
    mask = None
    if window is not None and window < steps:
        index = torch.arange(steps, device=q.device)
        distance = index[:, None] - index
        mask = distance.abs() < window
        if causal:
            mask &= distance >= 0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
