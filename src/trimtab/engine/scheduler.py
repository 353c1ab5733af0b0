"""Who computes how many tokens in the next step.

There are no phases. Every request has known tokens and computed tokens, and each step lets some requests
compute some more, within a token budget and within memory: prefill, its chunks, prefix hits, decoding,
scoring and recomputation after a preemption are all the same thing. When memory runs out, the youngest
running request is preempted: its rows are dropped and computed again later.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from trimtab.engine.request import Request, State
from trimtab.errors import RequestError
from trimtab.kvcache.base import KVCache

_WORTH_WAITING = 32  # tokens


@dataclass(slots=True)
class Pick:
    """Compute `count` tokens of `request`, from its first that is not computed."""

    request: Request
    count: int


class Scheduler:
    def __init__(self, cache: KVCache, max_batch: int, max_step_tokens: int, prefix_caching: bool) -> None:
        self.cache = cache
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.prefix_caching = prefix_caching and cache.shares_prefix
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival: the last is the first to be preempted
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self.failed: list[Request] = []  # ended here since the last step, for want of memory

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Pick]:
        """The next step's work; memory for it is reserved."""
        budget = self.max_step_tokens
        picks: list[Pick] = []
        preemptions = self.preemptions
        # Short spans first: a request that decodes must not wait behind a long prompt's chunk.
        decoding = [r for r in self.running if r.target - r.computed == 1]
        others = [r for r in self.running if r.target - r.computed != 1]
        for request in decoding + others:
            if request.state is not State.RUNNING or budget == 0:
                continue
            count = min(self._wanted(request), budget)
            if self._reserve(request, count):
                picks.append(Pick(request, count))
                budget -= count
        if self.preemptions > preemptions:
            # The room that this made is for who needed it; and whoever was preempted may have been picked.
            return [p for p in picks if p.request.state is State.RUNNING]
        while self.waiting and budget and len(self.running) < self.max_batch:
            request = self._next_waiting()
            if request is None or not self._start(request, budget):
                break
            count = min(self._wanted(request), budget)
            picks.append(Pick(request, count))
            budget -= count
        return picks

    def _wanted(self, request: Request) -> int:
        assert request.sequence is not None
        return self.cache.most_rows(request.sequence, request.target - request.computed)

    def _reserve(self, request: Request, count: int) -> bool:
        assert request.sequence is not None
        while not self.cache.reserve(request.sequence, count):
            victim = self.running[-1]
            if len(self.running) == 1:
                self._fail(request)
                return False
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _next_waiting(self) -> Request | None:
        for request in self.waiting:
            if self.prefix_caching and request.after is None and request.params.prompt_logprobs is None:
                self._follow(request)
            ahead = request.after
            if ahead is None or ahead.state is State.FINISHED or ahead.computed >= request.after_tokens:
                return request
        return None

    def _follow(self, request: Request) -> None:
        """Let the request wait for one that is computing the same beginning, to take it over."""
        for other in self.running:
            end = min(other.prompt_length, request.prompt_length)
            if end - other.computed < _WORTH_WAITING:
                continue
            common = 0
            while common < end and request.tokens[common : common + 16] == other.tokens[common : common + 16]:
                common += 16
            if common - other.computed >= _WORTH_WAITING:
                request.after, request.after_tokens = other, min(common, end)
                return

    def _start(self, request: Request, budget: int) -> bool:
        sequence = self.cache.open(request.prompt_length)
        if self.prefix_caching and request.params.prompt_logprobs is None:
            usable = request.tokens[: request.prompt_length] if request.scoring else request.tokens
            request.computed = self.cache.adopt_prefix(sequence, usable)
        request.sequence = sequence
        if not self.cache.reserve(sequence, min(self._wanted(request), budget)):
            self.cache.close(sequence)
            request.sequence, request.computed = None, 0
            if not self.running:
                self._fail(request)
            return False
        self.waiting.remove(request)
        self.running.append(request)
        request.state = State.RUNNING
        metrics = request.metrics
        if metrics.ttft_s is None and metrics.preemptions == 0:
            metrics.queue_s = time.perf_counter() - metrics.arrival
            metrics.cached_prompt_tokens = request.computed
            self.prefix_hit_tokens += request.computed
        return True

    def preempt(self, request: Request) -> None:
        """Drop the request's rows and put it first in the queue; its known tokens stay."""
        self._stop(request)
        request.state = State.WAITING
        request.metrics.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def rewind(self, request: Request, keep: int) -> None:
        """Take back all but `keep` generated tokens and put the request first in the queue."""
        self._stop(request)
        request.shorten(keep)
        request.state = State.WAITING
        self.waiting.appendleft(request)

    def finish(self, request: Request, reason: str, error: str | None = None) -> None:
        if request.state is State.RUNNING:
            self._stop(request)
        elif request.state is State.WAITING:
            self.waiting.remove(request)
        request.finish(reason, error)

    def _stop(self, request: Request) -> None:
        assert request.sequence is not None
        self.running.remove(request)
        self.cache.close(request.sequence)
        request.sequence, request.computed = None, 0

    def _fail(self, request: Request) -> None:
        message = (
            f"{self.cache.exhausted}, too little for one request of {len(request.tokens)} tokens; "
            "raise it, shorten the prompt or choose a smaller cache"
        )
        request.fault = RequestError
        self.finish(request, "error", message)
        self.failed.append(request)
