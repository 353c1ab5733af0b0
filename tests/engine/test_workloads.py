"""Random workloads: whatever is submitted, cancelled and preempted, every request gets its own text."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.fakes import continuation, fake_engine, greedy, prompt
from trimtab.engine.request import Request, State


class Workload(RuleBasedStateMachine):
    """Blocks are few, so that preemption, eviction of cached blocks and failures all happen."""

    @initialize(
        blocks=st.integers(3, 12),
        max_batch=st.integers(1, 5),
        max_step_tokens=st.sampled_from([1, 7, 16, 33, 200]),
        prefix_caching=st.booleans(),
        chunks_generated=st.booleans(),
    )
    def build(self, chunks_generated: bool, **options: Any) -> None:
        self.blocks = options["blocks"]
        self.engine, self.runner = fake_engine(**options)
        self.engine.cache.chunks_generated = chunks_generated
        self.live: list[tuple[list[Request], list[int], int]] = []

    @rule(
        length=st.integers(1, 70),
        seed=st.integers(0, 2),
        max_tokens=st.integers(1, 30),
        n=st.sampled_from([1, 1, 1, 3]),
    )
    def submit(self, length: int, seed: int, max_tokens: int, n: int) -> None:
        text = prompt(length, seed)
        group = self.engine.submit(text, greedy(max_tokens, n=n))
        self.live.append((group, text, max_tokens))

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        group, _, _ = data.draw(st.sampled_from(self.live))
        some = data.draw(st.lists(st.sampled_from(group), unique_by=id))
        before = {id(r): r.finish_reason for r in some}
        self.engine.cancel(some)
        for request in some:
            assert request.finish_reason == (before[id(request)] or "cancelled")
            assert request.sequence is None

    @rule()
    def finish(self) -> None:
        limit = 50_000
        while self.engine.scheduler.has_work:
            self.engine.step()
            limit -= 1
            assert limit, "the requests go round in circles"
        assert self.engine.cache.bytes_held == 0
        for group, text, max_tokens in self.live:
            for request in group:
                self.check_result(request, text, max_tokens)
        self.live = []

    def check_result(self, request: Request, text: list[int], max_tokens: int) -> None:
        full = continuation(text, max_tokens)
        assert request.output_ids == full[: len(request.output_ids)]
        if request.finish_reason == "length":
            assert request.output_ids == full
        elif request.finish_reason == "error":
            assert "kv_memory" in (request.error or "")
            assert len(request.tokens) > (self.blocks - 1) * 16, "it would have fitted alone"
        else:
            assert request.finish_reason == "cancelled"

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine, scheduler = self.engine, self.engine.scheduler
        engine.cache.check()
        assert len(scheduler.running) <= engine.plan.max_batch
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        assert len({id(r) for r in running + waiting}) == len(running) + len(waiting)
        assert all(r.state is State.RUNNING and r.sequence is not None for r in running)
        assert all(r.state is State.WAITING and r.sequence is None and r.computed == 0 for r in waiting)
        assert len({r.sequence.slot for r in running if r.sequence}) == len(running)
        assert engine.stats().kv_bytes_peak <= engine.plan.kv_memory
        for group, _, _ in self.live:
            for request in group:
                assert request.computed <= len(request.tokens)


TestWorkloads = Workload.TestCase
TestWorkloads.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
