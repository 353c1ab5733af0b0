"""Sampling settings through the whole engine, against the plain forward of the model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import trimtab
from kvcache.policies import make_engine, small_model, text
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.engine.engine import Engine

TOLERANCE = 1e-4
BACKENDS = pytest.mark.parametrize("backend", ["native", "torch"])


@torch.no_grad()
def truth(tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] after each token, float64."""
    return small_model()(torch.tensor([tokens]))[0].double().log_softmax(-1)


def one(engine: Engine, prompt: list[int], **params: Any) -> Any:
    settings = dict(max_tokens=12, temperature=0.0, ignore_eos=True) | params
    return engine.generate([prompt], SamplingParams(**settings))[0]


@BACKENDS
def test_logprobs_are_the_models_own(backend: str) -> None:
    """Whatever temperature, penalties and biases do to the draw."""
    engine, prompt = make_engine("full", backend), text(30, 1)
    for params in (
        dict(),
        dict(temperature=0.7, top_p=0.8, seed=3),
        dict(temperature=1.5, top_k=5, min_p=0.01, seed=4, presence_penalty=1.0, logit_bias={7: 5.0}),
    ):
        out = one(engine, prompt, logprobs=5, **params)
        rows = truth(prompt + out.token_ids)[len(prompt) - 1 : -1]
        total = 0.0
        for token, noted, row in zip(out.token_ids, out.logprobs, rows, strict=True):
            assert noted.token_id == token
            assert noted.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
            best = row.topk(5)
            assert [i for i, _ in noted.top] == best.indices.tolist()
            assert [x for _, x in noted.top] == pytest.approx(best.values.tolist(), abs=TOLERANCE)
            total += noted.logprob
        assert out.outputs[0].cumulative_logprob == pytest.approx(total)
    assert one(engine, prompt).logprobs is None


@BACKENDS
@pytest.mark.parametrize("max_step_tokens", [512, 9])
def test_prompt_logprobs(backend: str, max_step_tokens: int) -> None:
    engine = make_engine("full", backend, max_step_tokens=max_step_tokens)
    prompt = text(40, 2)
    rows = truth(prompt)
    for _ in range(2):  # the second time the prompt lies in the prefix cache
        out = one(engine, prompt, prompt_logprobs=3)
        assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == 40
        for i, noted in enumerate(out.prompt_logprobs[1:]):
            assert noted.token_id == prompt[i + 1]
            assert noted.logprob == pytest.approx(float(rows[i, prompt[i + 1]]), abs=TOLERANCE)
            assert [t for t, _ in noted.top] == rows[i].topk(3).indices.tolist()
        assert out.token_ids == one(engine, prompt).token_ids
    assert one(engine, prompt).prompt_logprobs is None
    assert one(engine, prompt[:1], prompt_logprobs=0).prompt_logprobs == [None]


def brute_force(prompt: list[int], count: int, change: Any) -> list[int]:
    """Greedy tokens where `change(logits, prompt, output)` edits the logits before each choice."""
    output: list[int] = []
    for _ in range(count):
        logits = small_model()(torch.tensor([prompt + output]))[0, -1].double().detach()
        change(logits, prompt, output)
        output.append(int(logits.argmax()))
    return output


def test_penalties_and_biases() -> None:
    engine, prompt = make_engine("full"), text(25, 3)

    def repetition(logits: torch.Tensor, prompt: list[int], output: list[int]) -> None:
        for t in set(prompt + output):
            logits[t] = logits[t] / 1.4 if logits[t] > 0 else logits[t] * 1.4

    def additive(logits: torch.Tensor, prompt: list[int], output: list[int]) -> None:
        for t, n in Counter(output).items():
            logits[t] -= 2.0 + 1.5 * n

    def bias(logits: torch.Tensor, prompt: list[int], output: list[int]) -> None:
        logits[5] += 3.0
        logits[best] -= 100.0

    best = one(engine, prompt).token_ids[0]
    plain = brute_force(prompt, 12, lambda *_: None)
    assert one(engine, prompt).token_ids == plain
    for params, change in (
        (dict(repetition_penalty=1.4), repetition),
        (dict(presence_penalty=2.0, frequency_penalty=1.5), additive),
        (dict(logit_bias={5: 3.0, best: -100.0}), bias),
    ):
        got = one(engine, prompt, max_tokens=40, **params).token_ids
        assert got == brute_force(prompt, 40, change)
        assert got != brute_force(prompt, 40, lambda *_: None)
    assert one(engine, prompt, logit_bias={9: 100.0}).token_ids == [9] * 12


def test_penalties_survive_preemption() -> None:
    prompts = [text(40, i) for i in range(5)]
    params = SamplingParams(
        max_tokens=30, temperature=0.9, seed=1, repetition_penalty=1.3, frequency_penalty=0.5
    )
    free = make_engine("full").generate(prompts, params)
    tight = make_engine("full", kv_memory="100KiB")
    again = tight.generate(prompts, params)
    assert tight.stats().preemptions > 0
    assert [o.token_ids for o in again] == [o.token_ids for o in free]


def test_seeds() -> None:
    engine, prompt = make_engine("full"), text(10, 4)

    def draw(**params: Any) -> list[int]:
        return one(engine, prompt, temperature=1.0, max_tokens=20, **params).token_ids

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw() != draw(), "without a seed every call is fresh"
    assert draw(seed=-5) == draw(seed=-5) != draw(seed=5)


def test_a_mixed_batch_gives_each_request_its_own_settings() -> None:
    """Greedy, sampled, penalised, many samples and scored requests together: each as alone."""
    settings = [
        SamplingParams(max_tokens=20, temperature=0),
        SamplingParams(max_tokens=25, temperature=1.0, seed=1, top_p=0.9),
        SamplingParams(max_tokens=9, temperature=0.5, seed=2, top_k=3, n=2),
        SamplingParams(max_tokens=15, temperature=0, repetition_penalty=1.5, logprobs=2),
        SamplingParams(max_tokens=5, temperature=2.0, seed=9, prompt_logprobs=1, min_tokens=5),
    ]
    prompts = [text(n, n) for n in (5, 40, 17, 33, 60)]

    def view(output: Any) -> Any:
        return [(o.token_ids, o.logprobs, o.finish_reason) for o in output.outputs], output.prompt_logprobs

    alone = [view(make_engine("full").generate([p], s)[0]) for p, s in zip(prompts, settings, strict=True)]
    engine = make_engine("full", max_step_tokens=23)
    waiting = engine.submit(text(50, 7), SamplingParams(max_tokens=30, ignore_eos=True))
    assert [view(o) for o in engine.generate(prompts, settings)] == alone
    while engine.scheduler.has_work:
        engine.step()
    assert len(waiting[0].output_ids) == 30
    backwards = engine.generate(prompts[::-1], settings[::-1])[::-1]
    assert [view(o) for o in backwards] == alone


def test_n_and_best_of() -> None:
    engine, prompt = make_engine("full"), text(20, 5)
    all_five = one(engine, prompt, temperature=1.0, seed=7, n=5, logprobs=0).outputs
    assert [o.index for o in all_five] == [0, 1, 2, 3, 4]
    assert len({tuple(o.token_ids) for o in all_five}) == 5
    best = one(engine, prompt, temperature=1.0, seed=7, n=2, best_of=5).outputs
    ranked = sorted(all_five, key=lambda o: -o.cumulative_logprob)
    assert [o.token_ids for o in best] == [o.token_ids for o in ranked[:2]]
    assert [o.index for o in best] == [0, 1] and best[0].logprobs is None


def test_more_samples_than_slots() -> None:
    engine, prompt = make_engine("full", max_batch=2), text(40, 6)
    wide = one(make_engine("full", max_batch=8), prompt, temperature=1.0, seed=7, n=6).outputs
    narrow = one(engine, prompt, temperature=1.0, seed=7, n=6).outputs
    assert [o.token_ids for o in narrow] == [o.token_ids for o in wide]


@BACKENDS
def test_scores(backend: str) -> None:
    engine = make_engine("full", backend, max_step_tokens=31)
    pairs = [(text(n, n), text(m, 90 + m)) for n, m in ((1, 1), (1, 30), (17, 5), (48, 16), (80, 50))]
    for (context, continuation), scored in zip(pairs, engine.score(pairs), strict=True):
        rows = truth(context + continuation)[len(context) - 1 : -1]
        exact = rows.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()
        assert scored.logprobs == pytest.approx(exact, abs=TOLERANCE)
        assert scored.greedy == (rows.argmax(-1) == torch.tensor(continuation)).tolist()
        assert scored.metrics.prompt_tokens == len(context)
    greedy = one(engine, pairs[3][0]).token_ids
    assert all(engine.score([(pairs[3][0], greedy)])[0].greedy)


def test_a_score_may_fill_the_whole_context() -> None:
    engine = make_engine("full")
    everything = text(600, 8)
    [scored] = engine.score([(everything[:1], everything[1:])])
    assert len(scored.logprobs) == 599


def test_stats() -> None:
    engine = make_engine("full", prefix_caching=False)
    one(engine, text(33, 9), max_tokens=4)
    stats = engine.stats()
    assert (stats.steps, stats.tokens) == (4, 33 + 3)
    assert stats.kv_bytes_peak == 3 * 16 * small_model().kv_bytes_per_token()
    assert stats.kv_bytes_held == stats.preemptions == stats.prefix_hit_tokens == 0
    assert stats.kv_bytes_peak <= stats.kv_bytes_capacity <= 16 << 20
    engine.reset_stats()
    assert (engine.stats().steps, engine.stats().tokens, engine.stats().kv_bytes_peak) == (0, 0, 0)


def test_an_engine_from_a_plan() -> None:
    plan = trimtab.Plan(cache="h2o:budget=40", max_batch=2, kv_memory="2MiB", threads=1)
    engine = Engine.from_plan(plan, small_model())
    assert engine.plan == plan and type(engine.cache).__name__ == "H2O"
    assert len(engine.generate([text(50)], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
