"""The C++ draw against decoding/processors.py: the same token for the same random number."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trimtab.decoding.sampler import Row, Sampler
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.kernels.build import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@functools.cache
def native() -> Sampler:
    from trimtab.kernels.native import Library

    return Sampler(Library(torch.float32, 2))


def some_mask(rng: np.random.Generator, vocab: int) -> NDArray[np.int32]:
    allowed = np.zeros(-(-vocab // 32) * 32, np.uint8)
    allowed[:vocab] = rng.random(vocab) < rng.choice([0.01, 0.5, 0.99])
    allowed[rng.integers(vocab)] = 1
    return np.packbits(allowed, bitorder="little").view(np.int32)


def some_row(rng: np.random.Generator, vocab: int) -> Row:
    def one(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    params = SamplingParams(
        temperature=one(0.0, 0.3, 1.0, 1.7),
        top_p=one(1.0, 0.9, 0.5, 1e-9),
        top_k=one(0, 1, 5, 50),
        min_p=one(0.0, 0.05, 0.3),
        frequency_penalty=one(0.0, 0.0, 0.7),
        logit_bias=one(None, {1: 3.0, 4: -100.0}),
        min_tokens=one(0, 2),
        max_tokens=8,
        logprobs=one(None, 2),
    )
    output = rng.integers(0, vocab, size=int(rng.integers(4))).tolist()
    mask = some_mask(rng, vocab) if rng.random() < 0.5 else None
    return Row(
        params, int(rng.integers(1 << 40)), 7, [1, 2], output, mask=mask, eos_ids=frozenset({vocab - 1})
    )


@pytest.mark.parametrize("vocab", [5, 37, 4096, 5000, 40_000])
def test_same_number_same_token(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for turn in range(60 if vocab < 10_000 else 6):
        logits = (rng.standard_normal((5, vocab)) * rng.choice([0.5, 3, 8])).astype(np.float32)
        if turn % 4 == 0:
            logits = np.round(logits)  # many ties
        rows = [some_row(rng, vocab) for _ in logits]
        wanted = Sampler().sample(torch.from_numpy(logits), rows)
        assert native().sample(torch.from_numpy(logits), rows) == wanted


def test_draws_follow_the_distribution() -> None:
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.standard_normal(64).astype(np.float32) * 2)
    params = SamplingParams(temperature=0.8, top_p=0.95)
    law = Sampler().distribution(logits, Row(params, 0, 0))
    draws = 20_000
    table = logits.expand(500, -1).contiguous()
    seen = np.zeros(64)
    for start in range(0, draws, 500):
        for one in native().sample(table, [Row(params, 9, start + i) for i in range(500)]):
            seen[one.token] += 1
    assert not seen[law == 0].any()
    kept = law > 0
    statistic = float(((seen - draws * law)[kept] ** 2 / (draws * law[kept])).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, "five standard deviations of chi-square"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_no_numbers_are_told_and_leave_others_alone(bad: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    if bad == -float("inf"):
        logits[1] = bad
    else:
        logits[1, 17] = bad
    rows = [Row(SamplingParams(top_k=7), 1, i) for i in range(3)]
    got = native().sample(logits, rows)
    assert got == Sampler().sample(logits, rows) or bad != bad
    assert got[1].token == -1 and got[1].error == Sampler().sample(logits, rows)[1].error
    assert got[0].error is got[2].error is None


def test_a_mask_that_allows_nothing_is_told() -> None:
    nothing = np.zeros(2, np.int32)
    for temperature in (0.0, 1.0):
        row = Row(SamplingParams(temperature=temperature), 1, 0, mask=nothing)
        [got] = native().sample(torch.zeros(1, 50), [row])
        assert got.token == -1 and "no token is allowed" in (got.error or "")


@pytest.mark.filterwarnings("error")
def test_settings_beyond_what_c_counts_to_mean_all_tokens() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        [far] = native().sample(logits, [Row(SamplingParams(top_k=10**30, temperature=1e308), seed, 0)])
        [flat] = native().sample(logits * 0, [Row(SamplingParams(), seed, 0)])
        assert far == flat
