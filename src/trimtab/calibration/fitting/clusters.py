"""Weighted k-means on a line: from a histogram, deterministic, with no library."""

from __future__ import annotations

import torch
from torch import Tensor


def centroids(places: Tensor, weights: Tensor, count: int, max_iter: int = 50) -> Tensor:
    """`count` ascending centroids float64 that make the weighted squared distance of `places` small.

    `places` [n] ascending and `weights` [n] >= 0, float64. Lloyd's algorithm from the weighted quantiles,
    until nothing moves or for `max_iter` rounds; a cluster that lost all its weight stays where it is.
    """
    mass = weights.cumsum(0)
    if not float(mass[-1]) > 0:
        weights, mass = torch.ones_like(places), torch.arange(1, len(places) + 1, dtype=places.dtype)
    wanted = (torch.arange(count, dtype=places.dtype) + 0.5) / count * mass[-1]
    centers = places[torch.searchsorted(mass, wanted).clamp(max=len(places) - 1)]
    for _ in range(max_iter):
        nearest = torch.searchsorted((centers[1:] + centers[:-1]) / 2, places)
        total = torch.zeros_like(centers).index_add_(0, nearest, weights)
        moment = torch.zeros_like(centers).index_add_(0, nearest, weights * places)
        moved = torch.where(total > 0, moment / total, centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers
