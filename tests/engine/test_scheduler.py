"""Who computes what in which step; the model is a pure function, so nothing else can interfere."""

from __future__ import annotations

import pytest

import trimtab
from engine.fakes import BLOCK_BYTES, FakeRunner, continuation, fake_engine, greedy, prompt
from trimtab.engine.request import Request, State
from trimtab.errors import NumericsError, RequestError


def counts(runner: FakeRunner, request: Request) -> list[int]:
    """How many of the request's tokens each step computed; 0 where it was left out."""
    return [sum(p.count for p in step if p.request is request) for step in runner.steps]


def run(engine: trimtab.Engine) -> None:
    while engine.scheduler.has_work:
        engine.step()
        engine.cache.check()
    assert engine.cache.bytes_held == 0


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    engine, runner = fake_engine(max_step_tokens=32)
    [request] = engine.submit(prompt(75), greedy(3))
    run(engine)
    assert counts(runner, request) == [32, 32, 11, 1, 1]
    assert request.output_ids == continuation(prompt(75), 3)
    assert request.finish_reason == "length"


def test_decoding_goes_before_chunks() -> None:
    engine, runner = fake_engine(max_step_tokens=32)
    [first] = engine.submit(prompt(5), greedy(6))
    engine.step()
    [long] = engine.submit(prompt(80, 1), greedy(2))
    engine.step()
    [late] = engine.submit(prompt(6, 2), greedy(2))
    run(engine)
    assert counts(runner, first) == [5, 1, 1, 1, 1, 1]
    assert counts(runner, long)[:4] == [0, 31, 31, 18], "chunks take what decoding leaves"
    assert counts(runner, late)[3] == 6, "what a prompt leaves goes to the next in the queue"


def test_more_requests_than_budget_all_end() -> None:
    engine, _ = fake_engine(max_step_tokens=2, max_batch=4)
    requests = [engine.submit(prompt(3, i), greedy(4))[0] for i in range(6)]
    run(engine)
    assert [r.output_ids for r in requests] == [continuation(prompt(3, i), 4) for i in range(6)]


def test_no_more_than_max_batch_run_and_the_queue_is_fair() -> None:
    engine, runner = fake_engine(max_batch=2)
    requests = [engine.submit(prompt(4, i), greedy(3))[0] for i in range(5)]
    run(engine)
    started = [next(i for i, c in enumerate(counts(runner, r)) if c) for r in requests]
    assert started == sorted(started)
    assert max(len(step) for step in runner.steps) == 2


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    engine, runner = fake_engine(blocks=4, max_step_tokens=64, prefix_caching=False)
    old, young, waiting = (engine.submit(prompt(30, i), greedy(20))[0] for i in range(3))
    while not engine.scheduler.preemptions:
        engine.step()
        assert not waiting.metrics.completion_tokens
    assert young.state is State.WAITING and young.sequence is None and young.computed == 0
    assert list(engine.scheduler.waiting) == [young, waiting]
    assert old.state is State.RUNNING
    run(engine)
    for i, request in enumerate((old, young, waiting)):
        assert request.output_ids == continuation(prompt(30, i), 20)
    assert old.metrics.preemptions == 0 and young.metrics.preemptions == 1
    assert counts(runner, old)[0] == 30 and set(counts(runner, old)[1:20]) == {1}


def test_a_request_preempted_after_it_was_picked_is_computed_once() -> None:
    """An old request that recomputes its tokens one by one takes the memory of a younger one that decodes,
    and was picked before it; with the room that gives, the younger one could start again at once."""
    engine, _ = fake_engine(blocks=4, max_step_tokens=17, prefix_caching=False)
    engine.cache.chunks_generated = False
    [old] = engine.submit(prompt(31), greedy(29))
    for _ in range(15):
        engine.step()
    engine.scheduler.preempt(old)
    engine.step()
    [young] = engine.submit(prompt(20, 1), greedy(30))
    run(engine)  # the runner refuses a step with the same request twice
    assert young.metrics.preemptions >= 1
    assert old.output_ids == continuation(prompt(31), 29)
    assert young.output_ids == continuation(prompt(20, 1), 30)


def test_nobody_is_started_in_the_step_that_preempted() -> None:
    """The room that a preemption made is for who needed it."""
    engine, _ = fake_engine(blocks=4, max_step_tokens=16)
    [old], [young] = engine.submit(prompt(14), greedy(40)), engine.submit(prompt(14, 1), greedy(40))
    seen = 0
    while engine.scheduler.has_work:
        engine.step()
        if engine.scheduler.preemptions > seen:
            seen = engine.scheduler.preemptions
            assert young.state is State.WAITING
    assert seen and old.metrics.preemptions == 0


def test_a_request_that_can_never_fit_fails_with_the_numbers() -> None:
    engine, _ = fake_engine(blocks=3)
    with pytest.raises(RequestError) as error:
        engine.generate([prompt(60)], greedy(4))
    assert "kv_memory is 6.0 KiB" in str(error.value) and "60 tokens" in str(error.value)
    assert engine.cache.bytes_held == 0
    assert engine.generate([prompt(20)], greedy(4))[0].token_ids == continuation(prompt(20), 4)


def test_growing_out_of_memory_fails_only_that_request() -> None:
    engine, _ = fake_engine(blocks=3)
    [large], [small] = engine.submit(prompt(40), greedy(30)), engine.submit(prompt(10, 1), greedy(5))
    run(engine)
    assert large.finish_reason == "error" and "49 tokens" in str(large.error)
    assert large.output_ids == continuation(prompt(40), 9), "what was generated is kept"
    assert small.output_ids == continuation(prompt(10, 1), 5)


def test_siblings_wait_for_the_first_and_share_its_prompt() -> None:
    engine, runner = fake_engine(max_batch=8, max_step_tokens=32)
    siblings = engine.submit(prompt(50), greedy(4, n=3, temperature=1.0, seed=5))
    [other] = engine.submit(prompt(8, 9), greedy(4))
    engine.step()
    assert [r.state for r in siblings] == [State.RUNNING, State.WAITING, State.WAITING]
    engine.step()
    assert other.state is State.RUNNING, "who need not wait overtakes"
    engine.step()
    assert all(r.state is State.RUNNING for r in siblings)
    assert [r.computed for r in siblings[1:]] == [50, 50]
    shared = {tuple(r.sequence.blocks[:3]) for r in siblings}  # type: ignore[union-attr]
    assert len(shared) == 1, "48 of the 50 tokens are held once"
    held = engine.cache.bytes_held
    assert held == (3 + 3 * 1 + 1) * BLOCK_BYTES
    run(engine)
    assert [counts(runner, r)[2] for r in siblings] == [1, 2, 2]
    assert [r.metrics.cached_prompt_tokens for r in siblings] == [0, 48, 48]


def test_siblings_start_at_once_without_prefix_caching_and_after_a_cancelled_first() -> None:
    engine, _ = fake_engine(prefix_caching=False)
    siblings = engine.submit(prompt(8), greedy(4, n=2, temperature=1.0))
    engine.step()
    assert all(r.state is State.RUNNING for r in siblings)
    run(engine)
    engine, _ = fake_engine(max_step_tokens=16)
    siblings = engine.submit(prompt(40), greedy(4, n=2, temperature=1.0))
    engine.step()
    engine.cancel(siblings[:1])
    run(engine)
    assert [r.finish_reason for r in siblings] == ["cancelled", "length"]


def test_a_later_text_with_the_same_beginning_is_not_computed_again() -> None:
    engine, runner = fake_engine()
    engine.generate([prompt(64)], greedy(2))
    assert engine.stats().kv_bytes_cached == 4 * BLOCK_BYTES
    [again] = engine.submit(prompt(64), greedy(2))
    [longer] = engine.submit([*prompt(64), 7, 8], greedy(2))
    [other] = engine.submit([4, *prompt(64)], greedy(2))
    run(engine)
    assert [r.metrics.cached_prompt_tokens for r in (again, longer, other)] == [48, 64, 0]
    assert sum(counts(runner, again)) == 16 + 1, "the last prompt token is always computed"
    assert engine.stats().prefix_hit_tokens == 112
    assert longer.output_ids == continuation([*prompt(64), 7, 8], 2)


def test_cached_blocks_give_way_to_running_requests_oldest_first() -> None:
    engine, _ = fake_engine(blocks=6)
    for i in range(2):
        engine.generate([prompt(32, i)], greedy(1))
    engine.generate([prompt(48, 2)], greedy(1))
    hits = []
    for i in (1, 0):
        [request] = engine.submit([*prompt(32, i), 5], greedy(1))
        run(engine)
        hits.append(request.metrics.cached_prompt_tokens)
    assert hits[0] > hits[1], "the text used last is still there, the oldest made way"


def test_cancelling_frees_memory_at_once() -> None:
    engine, runner = fake_engine(prefix_caching=False)
    [running], [waiting] = engine.submit(prompt(30), greedy(9)), engine.submit(prompt(30, 1), greedy(9))
    engine.step()
    engine.cancel([running, waiting])
    assert engine.cache.bytes_held == 0 and not engine.scheduler.has_work
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    engine.cancel([running])
    steps = len(runner.steps)
    assert engine.step() == [] and len(runner.steps) == steps
    engine.cache.check()


def test_closing_a_stream_cancels_it() -> None:
    engine, _ = fake_engine(prefix_caching=False)
    stream = engine.stream(prompt(10), greedy(50))
    assert next(stream).token_ids == continuation(prompt(10), 1)
    stream.close()
    assert engine.cache.bytes_held == 0 and not engine.scheduler.has_work


def test_numbers_that_are_none_end_only_their_request() -> None:
    engine, runner = fake_engine()
    bad, good = prompt(10), prompt(12, 1)
    runner.fail_on = bad + continuation(bad, 2)
    [first], [second] = engine.submit(bad, greedy(6)), engine.submit(good, greedy(6))
    run(engine)
    assert first.finish_reason == "error" and "not numbers" in str(first.error)
    assert first.output_ids == continuation(bad, 2)
    assert second.output_ids == continuation(good, 6)
    with pytest.raises(NumericsError, match="not numbers"):
        engine.generate([good, bad], greedy(6))
    assert engine.cache.bytes_held == 0


def test_an_exception_in_the_model_leaves_a_usable_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = fake_engine()
    whole = runner.run

    def broken(*arguments: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", broken)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt(9), prompt(5, 1)], greedy(3))
    assert engine.cache.bytes_held == 0 and not engine.scheduler.has_work
    monkeypatch.setattr(runner, "run", whole)
    assert engine.generate([prompt(9)], greedy(3))[0].token_ids == continuation(prompt(9), 3)


def test_scoring_needs_no_step_for_the_last_token() -> None:
    engine, runner = fake_engine()
    text = prompt(20)
    [scored] = engine.score([(text, continuation(text, 5))])
    assert scored.greedy == [True] * 5
    assert sum(p.count for step in runner.steps for p in step) == 24
    [scored] = engine.score([(text, [continuation(text, 1)[0], 2, 2])])
    assert scored.greedy == [True, False, False]


@pytest.mark.parametrize("shares", [True, False])
def test_a_burst_with_one_beginning_computes_it_once(shares: bool) -> None:
    """Also from cold: the others wait for the first one's blocks, and whoever shares nothing goes ahead."""
    engine, runner = fake_engine(blocks=200, max_batch=6, max_step_tokens=600, prefix_caching=shares)
    system = prompt(128)
    prompts = [system + prompt(5, seed) for seed in range(1, 5)]
    first, *others = [engine.submit(tokens, greedy(3))[0] for tokens in prompts]
    [stranger] = engine.submit(prompt(20, 9), greedy(3))
    run(engine)
    assert [r.output_ids for r in [first, *others]] == [continuation(tokens, 3) for tokens in prompts]
    assert [r.metrics.cached_prompt_tokens for r in others] == [128 * shares] * 3
    begun = [next(i for i, c in enumerate(counts(runner, r)) if c) for r in [first, stranger, *others]]
    assert begun == ([0, 0, 1, 1, 1] if shares else [0] * 5), "who shares nothing is not held up"


def test_who_waits_for_another_starts_when_that_one_is_cancelled_or_preempted() -> None:
    engine, _ = fake_engine(blocks=200, max_batch=4, max_step_tokens=512)
    system = prompt(128)
    [first] = engine.submit([*system, 3], greedy(3))
    [second] = engine.submit([*system, 4], greedy(3))
    engine.scheduler.schedule()
    assert second.after is first and second.state is State.WAITING
    engine.scheduler.preempt(first)
    engine.scheduler.schedule()
    assert first.state is State.RUNNING and second.state is State.WAITING
    engine.cancel([first])
    run(engine)
    assert second.output_ids == continuation([*system, 4], 3)
