"""Texts under way: prompts computed once, so that decoding can be timed again and again in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from _common import Sample
from _contenders import greedy

from trimtab import Engine
from trimtab.engine.request import Request
from trimtab.errors import RequestError


class UnderWay:
    """An engine that serves all `prompts` at once, each with its first token made.

    `warm_up` is served first and alone: it sizes every buffer, and its rows may be found in the prefix cache.
    Raises RequestError where a text does not fit.
    """

    def __init__(self, engine: Engine, prompts: Sequence[list[int]], warm_up: list[int]) -> None:
        self.engine = engine
        engine.generate(warm_up, greedy(2))
        engine.reset_stats()
        room = engine.model.config.context_length
        self.requests: list[Request] = []
        for prompt in prompts:
            self.requests += engine.submit(prompt, greedy(room - len(prompt)))
        while not all(r.output_ids for r in self.requests):
            engine.step()
            self._raise()
        # Prompts are computed in chunks, one after another: the median text stands for all.
        self.ttft_s = statistics.median(r.metrics.token_times[0] for r in self.requests)
        self.prompt_moved = engine.stats().kv_bytes_moved
        engine.reset_stats()

    def decode(self, tokens: int) -> Sample:
        """`tokens` more tokens of each text."""
        start = time.perf_counter()
        for _ in range(tokens):
            self.engine.step()
        seconds = time.perf_counter() - start
        self._raise()
        return Sample(tokens * len(self.requests), seconds, seconds / tokens)

    @property
    def read_per_step(self) -> int:
        """Bytes of cache that a decode step reads, each text counted as if it were alone."""
        return sum(self.engine.cache.read_per_step(r.sequence) for r in self.requests if r.sequence)

    def close(self) -> None:
        self.engine.cancel(self.requests)

    def _raise(self) -> None:
        for request in self.requests:
            if request.error:
                raise RequestError(request.error)
