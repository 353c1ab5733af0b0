from __future__ import annotations

import itertools

import torch

from trimtab.calibration.fitting.clusters import centroids


def cost(places: torch.Tensor, weights: torch.Tensor, centers: torch.Tensor) -> float:
    return float((weights * (places[:, None] - centers).square().amin(1)).sum())


def test_separate_heaps_are_found() -> None:
    places = torch.tensor([-1.0, -0.9, 0.0, 0.1, 0.9, 1.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    found = centroids(places, weights, 3)
    torch.testing.assert_close(found, torch.tensor([-0.95, 0.025, 2.9 / 3], dtype=torch.float64))


def test_near_the_best_of_all_divisions() -> None:
    """A line's best clusters are intervals, so all of them can be tried."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        places = torch.rand(14, generator=g, dtype=torch.float64).sort().values
        weights = torch.rand(14, generator=g, dtype=torch.float64)
        best = min(
            cost(
                places,
                weights,
                torch.stack(
                    [
                        (weights[a:b] * places[a:b]).sum() / weights[a:b].sum()
                        for a, b in itertools.pairwise((0, *cuts, 14))
                    ]
                ),
            )
            for cuts in itertools.combinations(range(1, 14), 3)
        )
        assert cost(places, weights, centroids(places, weights, 4)) < 2.5 * best


def test_weights_decide_and_the_result_is_ascending() -> None:
    places = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    even = centroids(places, torch.ones_like(places), 4)
    torch.testing.assert_close(even, torch.tensor([-0.75, -0.25, 0.25, 0.75]).double(), atol=0.01, rtol=0)
    left = centroids(places, torch.where(places < 0, 100.0, 1.0).double(), 4)
    assert int((left < 0).sum()) >= 3 and bool((left.diff() >= 0).all())


def test_no_weight_at_all_counts_places() -> None:
    places = torch.linspace(-1, 1, 100, dtype=torch.float64)
    zero = centroids(places, torch.zeros_like(places), 2)
    torch.testing.assert_close(zero, torch.tensor([-0.5, 0.5]).double(), atol=0.02, rtol=0)
