"""One HTTP request's texts on their way: what the engine's thread brings, and what the route takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.engine.engine import Prompt
    from trimtab.engine.request import Request, RequestMetrics, RequestOutput, TokenLogprob
    from trimtab.serving.worker import Worker


@dataclass(slots=True)
class Update:
    """What has come of one text since the last look. `index` counts the texts of one prompt."""

    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None
    stop_reason: str | int | None
    metrics: RequestMetrics

    @classmethod
    def of(cls, request: Request, place: tuple[int, int]) -> Update:
        piece = request.take()
        return cls(
            *place,
            piece.text,
            piece.token_ids,
            piece.logprobs,
            piece.finish_reason,
            piece.stop_reason,
            request.metrics,
        )

    def join(self, later: Update) -> None:
        """Take over what came after this."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs:
            self.logprobs += later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


@dataclass(eq=False)
class Ticket:
    """The texts of one request: prompts times `n`.

    Made by `Worker.submit`. Attributes `prompts` and `groups` (the engine's requests, a list a prompt) are
    set before it is handed out; `outputs` when all texts have ended. Used by one task of the event loop;
    `cancel` may be called from anywhere, any number of times.
    """

    worker: Worker
    name: str
    loop: asyncio.AbstractEventLoop
    live: bool
    interval_s: float | None
    prompts: list[Prompt] = field(default_factory=list)
    groups: list[list[Request]] = field(default_factory=list)
    outputs: list[RequestOutput] | None = None
    cancelled: bool = False
    due: float = 0.0  # the engine's thread brings nothing before that

    def __post_init__(self) -> None:
        self.admitted: asyncio.Future[None] = self.loop.create_future()
        self._pending: dict[tuple[int, int], Update] = {}
        self._error: Exception | None = None
        self._done = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def requests(self) -> list[Request]:
        return [request for group in self.groups for request in group]

    @property
    def metrics(self) -> list[RequestMetrics]:
        """The texts' meters as they are now, also while they run."""
        return [request.metrics for request in self.requests]

    def place_of(self, request: Request) -> tuple[int, int]:
        """(prompt, text of that prompt) of one of the requests."""
        if len(self.groups) == 1:
            return 0, request.index
        return next(i for i, group in enumerate(self.groups) if request in group), request.index

    async def __aiter__(self) -> AsyncIterator[list[Update]]:
        """What has come since the last look, at most one update a text, until all have ended.

        Raises what ended the texts early: RequestError, NumericsError, EngineFailure, NotServing.
        """
        if not self.live:
            raise AssertionError("only a live ticket hands out text as it comes")
        while True:
            if not self._pending and not self._done:
                await self._news()
            if self._pending:
                updates = list(self._pending.values())
                self._pending = {}
                yield updates
            elif self._done:
                break
        if self._error is not None:
            raise self._error

    async def wait(self, timeout_s: float | None = None) -> list[RequestOutput]:
        """The outputs, a prompt each, when all texts have ended.

        Raises TimeoutError (the texts go on; cancel them), or what ended them early.
        """
        async with asyncio.timeout(timeout_s):
            while not self._done:
                await self._news()
        if self._error is not None:
            raise self._error
        if self.outputs is None:
            raise asyncio.CancelledError("the request was cancelled")
        return self.outputs

    def cancel(self) -> None:
        """End what still runs."""
        if not self._done and not self.cancelled:
            self.cancelled = True
            self.worker.cancel(self)

    async def _news(self) -> None:
        """Until something has come or all texts have ended."""
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # --- called in the event loop for the worker

    def admit(self) -> None:
        _release(self.admitted)

    def refuse(self, error: Exception) -> None:
        if not self.admitted.done():
            self.admitted.set_exception(error)

    def deliver(self, updates: list[Update]) -> None:
        for update in updates:
            before = self._pending.get((update.prompt_index, update.index))
            if before is None:
                self._pending[update.prompt_index, update.index] = update
            else:
                before.join(update)
        if self._waiter is not None:
            _release(self._waiter)

    def finish(self, outputs: list[RequestOutput] | None, error: Exception | None) -> None:
        if self._done:
            return
        self.outputs, self._error, self._done = outputs, error, True
        if self._waiter is not None:
            _release(self._waiter)


def _release(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
