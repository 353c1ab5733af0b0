"""The thread that runs the engines, and what asyncio sees of it.

Engines are single-threaded, so one thread steps them all in turn; other threads leave commands in its inbox.
What a step brings goes to the event loop in one hand-over, not one a text: at 64 streams the hand-overs would
cost more than the tokens. For the same reason a stream is brought what has come at most once an interval.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.engine.request import State
from trimtab.errors import TrimtabError
from trimtab.serving.ticket import Ticket, Update

if TYPE_CHECKING:
    from trimtab.decoding.sampling_params import SamplingParams
    from trimtab.engine.engine import Engine, EngineStats
    from trimtab.engine.request import Request

log = logging.getLogger("trimtab.serving")

_FAILURES_FORGIVEN = 2
_NAP_S = 0.2
_LEAST_INTERVAL_S = 0.02
_INTERVAL_PER_TEXT_S = 0.001


class Overloaded(TrimtabError):
    """The queue is full; `retry_after_s` is about when there is room again."""

    def __init__(self, waiting: int, limit: int, retry_after_s: int) -> None:
        super().__init__(
            f"{waiting} requests wait already and the queue holds {limit}; try again in {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class NotServing(TrimtabError):
    """The server is loading, draining or broken."""


class EngineFailure(RuntimeError):
    """A bug of ours ended the requests that were under way."""


@dataclass(slots=True)
class WorkerStats:
    """One engine's meters and its queue."""

    engine: EngineStats
    running: int
    waiting: int


class Worker:
    """Runs the engines of the served plans in one thread.

    Args:
        engines: served name -> engine. Nothing else may drive them meanwhile.
        max_waiting: texts that may wait to be started, over all engines.
    """

    def __init__(self, engines: Mapping[str, Engine], *, max_waiting: int = 256) -> None:
        self._engines = dict(engines)
        self._max_waiting = max_waiting
        self._inbox: deque[Callable[[], None]] = deque()
        self._outbox: list[tuple[asyncio.AbstractEventLoop, Callable[..., None], tuple[object, ...]]] = []
        self._wake = threading.Event()
        self._tickets: dict[Request, Ticket] = {}
        self._thread: threading.Thread | None = None
        self._entering: dict[object, int] = {}  # texts on their way to the engine's thread
        self._finished_at: deque[float] = deque(maxlen=64)
        self._failures = 0
        self._ending = False
        self._problem = "the server is still loading; try again soon"

    # --- for any thread

    @property
    def ready(self) -> bool:
        """Whether requests are taken: False before `start`, while draining, and after repeated failures."""
        return not self._problem

    @property
    def names(self) -> list[str]:
        return list(self._engines)

    def engine(self, name: str) -> Engine:
        return self._engines[name]

    def stats(self, name: str) -> WorkerStats:
        engine = self._engines[name]
        return WorkerStats(engine.stats(), len(engine.scheduler.running), len(engine.scheduler.waiting))

    @property
    def waiting(self) -> int:
        """Texts that are not started yet, over all engines."""
        entering = sum(list(self._entering.values()))
        return entering + sum(len(e.scheduler.waiting) for e in self._engines.values())

    @property
    def stream_interval_s(self) -> float:
        """The least time between two chunks of a stream that keeps writing chunks a small part of the work: a
        chunk costs about a tenth of a millisecond, and all texts share the event loop."""
        return max(_LEAST_INTERVAL_S, _INTERVAL_PER_TEXT_S * len(self._tickets))

    def start(self) -> None:
        """Start the thread and take requests."""
        # A thread that comes back from a kernel must not wait the usual 5 ms for the interpreter.
        sys.setswitchinterval(0.0005)
        self._thread = threading.Thread(target=self._run, name="trimtab-engine", daemon=True)
        self._problem = ""
        self._thread.start()

    def drain(self) -> None:
        """Take no further requests; those under way go on."""
        self._problem = "the server is shutting down"

    def stop(self, drain_s: float | None = 0.0) -> None:
        """Let what is under way end for at most `drain_s` seconds (None: as long as it takes), then cancel
        the rest and end the thread."""
        self.drain()
        deadline = None if drain_s is None else time.monotonic() + drain_s
        while self._busy and self._alive and (deadline is None or time.monotonic() < deadline):
            time.sleep(0.01)
        self._ending = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    # --- for the event loop

    async def submit(
        self,
        name: str,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        *,
        live: bool = False,
        interval_s: float | None = 0.0,
    ) -> Ticket:
        """Queue prompts (token ids), each with its parameters, as one ticket.

        Args:
            live: the ticket hands out text as it comes (iterate over it); otherwise only at the end.
            interval_s: least time between two updates of a live ticket; None: as `stream_interval_s`.

        Raises RequestError if one of them cannot be served (none is queued then), Overloaded if the queue is
        full, NotServing if no requests are taken.
        """
        if self._problem:
            raise NotServing(self._problem)
        texts = sum(p.num_samples for p in params)
        waiting = self.waiting
        # An idle server takes any one request, however many texts it asks for.
        if waiting and waiting + texts > self._max_waiting:
            raise Overloaded(waiting, self._max_waiting, self._retry_after(waiting))
        entry = object()
        self._entering[entry] = texts
        try:
            engine = self._engines[name]
            # Compiled and kept now, so that the engine's thread need not do it.
            for wish in [p.structured_outputs for p in params if p.structured_outputs is not None]:
                await asyncio.to_thread(engine.compile, wish)
            ticket = Ticket(self, name, asyncio.get_running_loop(), live, interval_s)
            self._send(lambda: self._admit(entry, ticket, prompts, params))
            try:
                await ticket.admitted
            except asyncio.CancelledError:
                ticket.cancel()
                raise
            return ticket
        finally:
            self._entering.pop(entry, None)

    def _retry_after(self, waiting: int) -> int:
        """Seconds until the queue is about empty, from how fast texts ended lately."""
        ended = list(self._finished_at)
        if len(ended) < 2:
            return 1
        rate = len(ended) / max(time.monotonic() - ended[0], 1e-3)
        return max(1, min(60, round(waiting / rate)))

    def cancel(self, ticket: Ticket) -> None:
        """End a ticket's texts; their memory is free within one step."""
        self._send(lambda: self._cancel(ticket))

    def _send(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    # --- the engines' thread

    @property
    def _busy(self) -> bool:
        return bool(self._tickets or self._inbox or self._entering)

    @property
    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        while not self._ending:
            # Cleared before the inbox is read: a command that comes later sets it again.
            self._wake.clear()
            while self._inbox:
                self._inbox.popleft()()
            waiting = self._outbox
            busy = [engine for engine in self._engines.values() if engine.scheduler.has_work]
            for engine in busy:
                self._step(engine)
            if not any(engine.scheduler.has_work for engine in busy) or self._outbox is waiting:
                self._hand_over()  # no model is about to run
            if not busy and not self._inbox:
                self._wake.wait(_NAP_S)
        while self._inbox:
            self._inbox.popleft()()
        self._fail_all(list(self._engines.values()), NotServing("the server is shutting down"))
        self._hand_over()

    def _tell(self, loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
        """Have the event loop call something, with the next hand-over."""
        self._outbox.append((loop, function, args))

    def _hand_over(self) -> None:
        """Give the event loops what is in the outbox.

        Done while the model runs, as far as can be: both threads need the interpreter, and what the event
        loop does between two steps holds the engine up.
        """
        calls, self._outbox = self._outbox, []
        for loop in dict.fromkeys(loop for loop, _, _ in calls):
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever asked
                loop.call_soon_threadsafe(_call_all, [call[1:] for call in calls if call[0] is loop])

    def _step(self, engine: Engine) -> None:
        try:
            touched = engine.step(self._hand_over)
        except Exception as error:
            log.exception("an engine step failed")
            self._failures += 1
            if self._failures > _FAILURES_FORGIVEN:
                self._problem = "the engine has failed repeatedly; restart the server"
            what = f"{type(error).__name__} in the engine; see the server's log"
            self._fail_all([engine], EngineFailure(what))
            return
        now = time.monotonic()
        news: dict[Ticket, list[Update]] = {}
        ended: dict[Ticket, None] = {}
        for request in touched:
            ticket = self._tickets.get(request)
            if ticket is None:
                continue
            finished = request.state is State.FINISHED
            # What is not due stays with the request, which costs nothing, and comes with a later step.
            if ticket.live and (finished or now >= ticket.due) and not request.held_back:
                news.setdefault(ticket, []).append(Update.of(request, ticket.place_of(request)))
            if finished:
                del self._tickets[request]
                self._finished_at.append(time.monotonic())
                ended[ticket] = None
        for ticket, updates in news.items():
            interval = self.stream_interval_s if ticket.interval_s is None else ticket.interval_s
            ticket.due = now + interval
            self._tell(ticket.loop, ticket.deliver, updates)
        for ticket in ended:
            self._end(engine, ticket)

    def _end(self, engine: Engine, ticket: Ticket) -> None:
        """Close a ticket whose texts have all ended, or of which one has failed."""
        requests = ticket.requests
        failed = next((r for r in requests if r.error), None)
        if failed is not None:
            self._cancel(ticket, failed.fault(failed.error or ""))
        elif all(r.state is State.FINISHED for r in requests):
            pairs = zip(ticket.prompts, ticket.groups, strict=True)
            outputs = [engine.output(prompt, group) for prompt, group in pairs]
            self._tell(ticket.loop, ticket.finish, outputs, None)

    def _admit(
        self, entry: object, ticket: Ticket, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> None:
        self._entering.pop(entry, None)  # from here on the scheduler counts them
        if ticket.cancelled:
            return
        engine = self._engines[ticket.name]
        groups: list[list[Request]] = []
        try:
            for prompt, wishes in zip(prompts, params, strict=True):
                groups.append(engine.submit(prompt, wishes))
        except Exception as error:
            engine.cancel([r for group in groups for r in group])
            if not isinstance(error, TrimtabError):
                log.exception("a request could not be queued")
                error = EngineFailure(f"{type(error).__name__} while queueing; see the server's log")
            self._tell(ticket.loop, ticket.refuse, error)
            return
        ticket.prompts, ticket.groups = list(prompts), groups
        for request in ticket.requests:
            self._tickets[request] = ticket
        self._tell(ticket.loop, ticket.admit)

    def _cancel(self, ticket: Ticket, error: Exception | None = None) -> None:
        engine = self._engines[ticket.name]
        engine.cancel(ticket.requests)
        for request in ticket.requests:
            self._tickets.pop(request, None)
        self._tell(ticket.loop, ticket.finish, None, error)

    def _fail_all(self, engines: Sequence[Engine], error: Exception) -> None:
        """End everything these engines work on, as well as can be."""
        names = {name for name, engine in self._engines.items() if engine in engines}
        for ticket in dict.fromkeys(self._tickets.values()):
            if ticket.name in names:
                try:
                    self._cancel(ticket, error)
                except Exception:
                    log.exception("the cache could not be put in order")
                    self._problem = "the engine has failed; restart the server"
                    for request in ticket.requests:
                        self._tickets.pop(request, None)
                    self._tell(ticket.loop, ticket.finish, None, error)


def _call_all(calls: list[tuple[Callable[..., None], tuple[object, ...]]]) -> None:
    for function, args in calls:
        function(*args)
