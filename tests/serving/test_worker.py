"""The engines' thread and its tickets: what comes is what the engine says, and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.fakes import fake_engine, greedy, prompt
from trimtab import Engine, SamplingParams
from trimtab.errors import NumericsError, RequestError
from trimtab.serving.worker import EngineFailure, NotServing, Overloaded, Worker


@asynccontextmanager
async def serving(*engines: Engine, **settings: Any) -> AsyncIterator[Worker]:
    worker = Worker({f"e{i}": engine for i, engine in enumerate(engines)}, **settings)
    worker.start()
    try:
        yield worker
    finally:
        await asyncio.to_thread(worker.stop)
        for engine in engines:
            assert not engine.scheduler.has_work
            assert engine.stats().kv_bytes_held == 0
            engine.cache.check()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def endless(seed: int = 0) -> SamplingParams:
    return greedy(200)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("interval_s", [0.0, 0.005, None])
def test_pieces_joined_are_the_whole(interval_s: float | None) -> None:
    params = SamplingParams(max_tokens=12, n=2, seed=3, logprobs=2, ignore_eos=True)
    prompts = [prompt(9, 1), prompt(20, 2)]
    wanted = fake_engine()[0].generate(prompts, params)

    async def test() -> None:
        async with serving(fake_engine()[0]) as worker:
            ticket = await worker.submit("e0", prompts, [params] * 2, live=True, interval_s=interval_s)
            ids: dict[tuple[int, int], list[int]] = {}
            logprobs: dict[tuple[int, int], list[Any]] = {}
            reasons = {}
            async for updates in ticket:
                places = [(u.prompt_index, u.index) for u in updates]
                assert len(set(places)) == len(places)
                for place, update in zip(places, updates, strict=True):
                    ids.setdefault(place, []).extend(update.token_ids)
                    logprobs.setdefault(place, []).extend(update.logprobs or [])
                    assert reasons.setdefault(place, update.finish_reason) is None or update.finish_reason
                    reasons[place] = update.finish_reason
            for i, output in enumerate(wanted):
                for j, completion in enumerate(output.outputs):
                    assert ids[i, j] == completion.token_ids
                    assert logprobs[i, j] == completion.logprobs
                    assert reasons[i, j] == completion.finish_reason == "length"
            assert ticket.outputs is not None
            assert [o.outputs[1].token_ids for o in ticket.outputs] == [
                o.outputs[1].token_ids for o in wanted
            ]

    run(test)


def test_two_engines_work_side_by_side() -> None:
    async def test() -> None:
        async with serving(fake_engine()[0], fake_engine()[0]) as worker:
            tickets = [await worker.submit(name, [prompt(5)], [greedy(20)]) for name in worker.names]
            first, second = [await t.wait() for t in tickets]
            assert first[0].token_ids == second[0].token_ids
            assert len(first[0].token_ids) == 20

    run(test)


def test_cancelling_frees_memory_within_one_step() -> None:
    async def test() -> None:
        engine, runner = fake_engine()
        async with serving(engine) as worker:
            ticket = await worker.submit("e0", [prompt(5)], [endless()], live=True)
            async for _ in ticket:
                break
            steps = len(runner.steps)
            gate = threading.Event()
            original = runner.run
            runner.run = lambda *a: (gate.wait(5), original(*a))[1]  # type: ignore[method-assign]
            await asyncio.sleep(0.01)
            steps = len(runner.steps)
            ticket.cancel()
            ticket.cancel()
            gate.set()
            await until(lambda: worker.stats("e0").running == 0)
            assert len(runner.steps) <= steps + 1
            with pytest.raises(asyncio.CancelledError):
                await ticket.wait()

    run(test)


def test_a_refused_prompt_leaves_nothing_behind_and_others_alone() -> None:
    async def test() -> None:
        async with serving(fake_engine()[0]) as worker:
            good = await worker.submit("e0", [prompt(5)], [greedy(30)])
            with pytest.raises(RequestError, match="the prompt is empty"):
                await worker.submit("e0", [prompt(5), []], [greedy(30)] * 2)
            with pytest.raises(RequestError, match="token id 99"):
                await worker.submit("e0", [[99]], [greedy(30)])
            assert len((await good.wait())[0].token_ids) == 30
            assert worker.waiting == 0

    run(test)


def test_a_full_queue_says_when_to_come_again() -> None:
    async def test() -> None:
        async with serving(fake_engine(max_batch=1)[0], max_waiting=2) as worker:
            first = await worker.submit("e0", [prompt(5)], [endless()])
            await until(lambda: worker.stats("e0").running == 1)
            tickets = [await worker.submit("e0", [prompt(5, i)], [endless()]) for i in range(2)]
            with pytest.raises(Overloaded, match="the queue holds 2") as told:
                await worker.submit("e0", [prompt(5)], [greedy(1)])
            assert 1 <= told.value.retry_after_s <= 60
            for ticket in [first, *tickets]:
                ticket.cancel()
            await until(lambda: worker.waiting == 0)
            again = await worker.submit("e0", [prompt(5)], [greedy(2)])
            assert len((await again.wait())[0].token_ids) == 2

    run(test)


def test_a_burst_that_fits_into_the_queue_is_taken() -> None:
    """Texts are counted once, also while they go from one thread to the other."""

    async def test() -> None:
        async with serving(fake_engine(max_batch=1)[0], max_waiting=40) as worker:
            burst = [worker.submit("e0", [prompt(3, i)], [greedy(2)]) for i in range(40)]
            tickets = await asyncio.gather(*burst)
            outs = [await ticket.wait() for ticket in tickets]
            assert [len(out[0].token_ids) for out in outs] == [2] * 40
            assert worker.waiting == 0

    run(test)


def test_a_text_that_fails_ends_its_ticket_alone() -> None:
    async def test() -> None:
        engine, runner = fake_engine()
        runner.fail_on = prompt(7, 3)
        async with serving(engine) as worker:
            good = await worker.submit("e0", [prompt(5)], [greedy(20)])
            bad = await worker.submit("e0", [prompt(7, 3), prompt(8, 2)], [greedy(20)] * 2)
            with pytest.raises(NumericsError, match="not numbers"):
                await bad.wait()
            assert len((await good.wait())[0].token_ids) == 20
            assert worker.ready

    run(test)


def test_a_bug_in_a_step_is_an_error_of_ours_and_the_server_goes_on() -> None:
    async def test() -> None:
        engine, runner = fake_engine()
        async with serving(engine) as worker:
            original = runner.run

            def broken(*args: Any) -> Any:
                raise ZeroDivisionError

            for turn in range(3):
                runner.run = broken  # type: ignore[method-assign]
                ticket = await worker.submit("e0", [prompt(5)], [greedy(5)])
                with pytest.raises(EngineFailure, match="ZeroDivisionError"):
                    await ticket.wait()
                runner.run = original  # type: ignore[method-assign]
                if turn < 2:
                    fine = await worker.submit("e0", [prompt(5)], [greedy(5)])
                    assert len((await fine.wait())[0].token_ids) == 5
            assert not worker.ready
            with pytest.raises(NotServing, match="failed repeatedly"):
                await worker.submit("e0", [prompt(5)], [greedy(5)])

    run(test)


def test_draining_ends_what_is_under_way_and_takes_nothing_new() -> None:
    async def test() -> None:
        engine, _ = fake_engine()
        async with serving(engine) as worker:
            ticket = await worker.submit("e0", [prompt(5)], [greedy(100)])
            stopping = asyncio.create_task(asyncio.to_thread(worker.stop, None))
            await until(lambda: not worker.ready)
            with pytest.raises(NotServing, match="shutting down"):
                await worker.submit("e0", [prompt(5)], [greedy(1)])
            assert len((await ticket.wait())[0].token_ids) == 100
            await stopping

    run(test)


def test_what_does_not_end_in_time_is_ended() -> None:
    async def test() -> None:
        engine, runner = fake_engine()
        original = runner.run
        runner.run = lambda *a: (time.sleep(0.01), original(*a))[1]  # type: ignore[method-assign]
        async with serving(engine) as worker:
            ticket = await worker.submit("e0", [prompt(5)], [endless()])
            await asyncio.to_thread(worker.stop, 0.05)
            with pytest.raises(NotServing, match="shutting down"):
                await ticket.wait()

    run(test)


def test_waiting_has_a_bound_of_its_own() -> None:
    async def test() -> None:
        engine, runner = fake_engine()
        gate = threading.Event()
        original = runner.run
        runner.run = lambda *a: (gate.wait(5), original(*a))[1]  # type: ignore[method-assign]
        async with serving(engine) as worker:
            ticket = await worker.submit("e0", [prompt(5)], [greedy(3)])
            with pytest.raises(TimeoutError):
                await ticket.wait(0.02)
            gate.set()
            assert len((await ticket.wait())[0].token_ids) == 3

    run(test)
