"""Every policy on both backends: the identity setting, and the same text however it is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcache.policies import (
    IDENTITY,
    LOSSY,
    PROMPTS,
    SETTINGS,
    Result,
    make_engine,
    params,
    results,
    small_model,
    text,
    undisturbed,
)
from trimtab.registry import KV_CACHES

policy = pytest.mark.parametrize("name", SETTINGS)


def test_the_matrix_is_complete() -> None:
    assert {c.split(":")[0] for c in LOSSY.values()} == set(IDENTITY) == set(KV_CACHES.names())


@pytest.mark.slow
def test_the_settings_do_lose_something() -> None:
    for name in LOSSY:
        assert (undisturbed(name) == undisturbed("full")) == (name == "full"), name


@pytest.mark.parametrize("name", IDENTITY)
def test_the_identity_setting_is_the_full_cache_bit_for_bit(name: str) -> None:
    assert results(make_engine(IDENTITY[name])) == undisturbed("full")


@policy
def test_a_batch_gives_each_text_as_alone(name: str) -> None:
    assert results(make_engine(LOSSY[name])) == undisturbed(name)


@policy
@pytest.mark.parametrize("max_step_tokens", [16, 100])
def test_chunked_is_whole(name: str, max_step_tokens: int) -> None:
    engine = make_engine(LOSSY[name], max_step_tokens=max_step_tokens, prefix_caching=False)
    assert results(engine) == undisturbed(name)


@policy
def test_the_order_of_requests_does_not_matter(name: str) -> None:
    engine = make_engine(LOSSY[name], max_batch=3)
    assert results(engine, PROMPTS[::-1])[::-1] == undisturbed(name)
    assert results(engine) == undisturbed(name), "nor what was there before"


@policy
def test_preempted_is_undisturbed(name: str) -> None:
    """As little memory as the largest text needs: the others are thrown out again and again."""
    largest = 0
    for prompt in PROMPTS:
        engine = make_engine(LOSSY[name], prefix_caching=False)
        results(engine, [prompt])
        largest = max(largest, engine.stats().kv_bytes_peak)
    engine = make_engine(LOSSY[name], kv_memory=int(largest * 1.25), max_step_tokens=64)
    assert results(engine) == undisturbed(name)
    stats = engine.stats()
    assert stats.preemptions > 0, "nothing was put to the test"
    assert stats.kv_bytes_peak <= stats.kv_bytes_capacity <= int(largest * 1.25)


@policy
def test_prefix_cached_is_cold(name: str) -> None:
    engine = make_engine(LOSSY[name])
    base = PROMPTS[-1]
    for prompt in (base, base[:100] + text(20, 5), base + text(9, 6), base):
        cold = results(make_engine(LOSSY[name], prefix_caching=False), [prompt])
        assert results(engine, [prompt]) == cold
    hits = engine.stats().prefix_hit_tokens
    # 6, 12 and 12 blocks; a policy that does not share prefixes must not pretend to.
    assert hits == ((6 + 12 + 12) * 16 if name == "full" else 0)


@policy
def test_threads_do_not_matter(name: str) -> None:
    assert results(make_engine(LOSSY[name], threads=3)) == undisturbed(name)


@policy
def test_siblings_equal_texts_asked_one_by_one(name: str) -> None:
    """Each sample is the same whether made with its siblings or by asking for fewer."""
    engine = make_engine(LOSSY[name])
    three = engine.generate([PROMPTS[3]], params(n=3))[0].outputs
    assert three[0].token_ids == undisturbed(name)[3][0]
    two = engine.generate([PROMPTS[3]], params(n=2))[0].outputs
    assert [o.token_ids for o in two] == [o.token_ids for o in three[:2]]
    assert len({tuple(o.token_ids) for o in three}) == 3


@policy
def test_scoring_is_decoding(name: str) -> None:
    """A lossy cache shows its effect in `score` exactly as it does when the same tokens are generated."""
    generated = undisturbed(name)
    pairs = [(p, tokens) for p, (tokens, _) in zip(PROMPTS, generated, strict=True)]
    for max_step_tokens in (512, 20):
        scored = make_engine(LOSSY[name], max_step_tokens=max_step_tokens).score(pairs)
        assert [s.logprobs for s in scored] == [logprobs for _, logprobs in generated]


@policy
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_half_precision_keeps_the_invariances(name: str, dtype: torch.dtype) -> None:
    model = small_model.__wrapped__(dtype)
    alone = [results(make_engine(LOSSY[name], model=model), [p])[0] for p in PROMPTS]
    assert results(make_engine(LOSSY[name], model=model, max_step_tokens=50)) == alone


# --- the torch kernels: matmul libraries sum in another order for another number of rows


def scores(engine: Any, pairs: list[tuple[list[int], list[int]]]) -> list[list[float]]:
    return [s.logprobs for s in engine.score(pairs)]


def nearly(mine: list[list[float]], other: list[list[float]]) -> None:
    """Equal up to rounding; a rounding that flips a code or an eviction may move a few tokens further."""
    difference = (torch.tensor(mine) - torch.tensor(other)).abs()
    assert difference.quantile(0.75) < 5e-4
    assert difference.mean() < 5e-3


TORCH_PAIRS = [(p, text(12, 40 + i)) for i, p in enumerate(PROMPTS[1::2])]


@policy
def test_torch_agrees_with_native(name: str) -> None:
    nearly(
        scores(make_engine(LOSSY[name], "torch"), TORCH_PAIRS), scores(make_engine(LOSSY[name]), TORCH_PAIRS)
    )


@policy
@pytest.mark.parametrize(
    "options", [pytest.param(dict(max_batch=1), marks=pytest.mark.slow), dict(max_step_tokens=24)], ids=str
)
def test_torch_regrouped(name: str, options: dict[str, Any]) -> None:
    whole = scores(make_engine(LOSSY[name], "torch"), TORCH_PAIRS)
    nearly(scores(make_engine(LOSSY[name], "torch", **options), TORCH_PAIRS), whole)


@pytest.mark.parametrize("name", IDENTITY)
def test_torch_identity(name: str) -> None:
    mine = scores(make_engine(IDENTITY[name], "torch"), TORCH_PAIRS)
    for a, b in zip(mine, scores(make_engine("full", "torch"), TORCH_PAIRS), strict=True):
        assert a == pytest.approx(b, abs=2e-5, rel=2e-6)


def test_results_have_numbers() -> None:
    first: Result = undisturbed("full")[0]
    assert len(first[0]) == len(first[1]) == 40 and all(x < 0 for x in first[1])
