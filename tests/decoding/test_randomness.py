"""Counter-based randomness: fixed values, even spread, no relation between neighbouring counters."""

import math

import numpy as np
import pytest

from trimtab.decoding.randomness import Purpose, child_seed, fresh_seed, uniform, uniforms

GOLDEN = [
    0.33805245419550545,
    0.44255783193913834,
    0.16259021117856254,
    0.33342465421293366,
    0.11913871099749151,
    0.11913871099749151,
]
GOLDEN_CHILDREN = [42, 12677107341799379033, 12491120164837469897]


def test_values_never_change():
    drawn = [
        uniform(0, 0),
        uniform(42, 7),
        uniform(42, 7, Purpose.ACCEPT),
        uniform(42, 7, Purpose.SAMPLE, 3),
        uniform(-1, 123456),
        uniform(2**64 - 1, 123456),
    ]
    assert drawn == GOLDEN
    assert [child_seed(42, i) for i in range(3)] == GOLDEN_CHILDREN


def test_vector_equals_scalar():
    for seed, position in [(0, 0), (2**64 - 1, 5), (12345, 10**9)]:
        for purpose in Purpose:
            expected = [uniform(seed, position, purpose, i) for i in range(100)]
            assert uniforms(seed, position, purpose, 100).tolist() == expected


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations above the mean (Wilson-Hilferty), for any number of cells."""
    x = float(((observed - expected) ** 2 / expected).sum())
    cells = observed.size - 1
    return ((x / cells) ** (1 / 3) - (1 - 2 / (9 * cells))) / math.sqrt(2 / (9 * cells))


@pytest.mark.parametrize("over", ["seed", "position", "index", "purpose and position"])
def test_uniform_along_every_counter(over):
    n = 50_000
    draws = {
        "seed": lambda: [uniform(i, 17) for i in range(n)],
        "position": lambda: [uniform(3, i) for i in range(n)],
        "index": lambda: uniforms(3, 9, Purpose.GUMBEL, n).tolist(),
        "purpose and position": lambda: [uniform(3, i // 5, i % 5) for i in range(n)],
    }
    u = np.array(draws[over]())
    assert u.min() >= 0.0 and u.max() < 1.0
    assert len(np.unique(u)) == n
    cells = np.bincount((u * 100).astype(int), minlength=100)
    assert abs(chi_square(cells, np.full(100, n / 100))) < 4
    # The low bits must be as even as the high ones.
    low = (u * 2**53).astype(np.uint64).astype(np.int64) % 64
    assert abs(chi_square(np.bincount(low, minlength=64), np.full(64, n / 64))) < 4


@pytest.mark.parametrize(
    "neighbour",
    [
        lambda i: uniform(5, i + 1),
        lambda i: uniform(6, i),
        lambda i: uniform(5, i, Purpose.ACCEPT),
        lambda i: uniform(5, i, Purpose.SAMPLE, 1),
        lambda i: uniform(child_seed(5, 1), i),
        lambda i: uniform(6, i - 1) if i else uniform(6, 99_999),
    ],
    ids=["position", "seed", "purpose", "index", "child", "seed and position"],
)
def test_neighbouring_counters_are_independent(neighbour):
    n = 40_000
    first = np.array([uniform(5, i) for i in range(n)])
    second = np.array([neighbour(i) for i in range(n)])
    assert not np.any(first == second)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(n)
    pairs = (first * 10).astype(int) * 10 + (second * 10).astype(int)
    assert abs(chi_square(np.bincount(pairs, minlength=100), np.full(100, n / 100))) < 4


def test_streams_of_seeds_do_not_overlap():
    streams = {uniform(seed, position) for seed in range(200) for position in range(200)}
    assert len(streams) == 200 * 200


def test_child_seeds():
    assert child_seed(9, 0) == 9
    assert child_seed(-1, 0) == 2**64 - 1
    children = {child_seed(seed, i) for seed in range(100) for i in range(100)}
    assert len(children) == 100 * 100


def test_fresh_seeds_differ():
    assert len({fresh_seed() for _ in range(100)}) == 100
