"""Sending requests: at given times whatever the server does (open loop), or one after another (closed)."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from trimtab.evaluation.load.client import Client, Exchange, now

LEAD_S = 0.05  # between the start of a run and its first moment
FINEST_SLEEP_S = 0.0005

T = TypeVar("T")


@dataclass(slots=True)
class Run:
    """Exchanges of one run, the window in which they are counted, and what the client itself took."""

    exchanges: list[Exchange]
    start: float  # of the window, clock time
    seconds: float
    client_cpu: float = 0.0  # CPU seconds per second, of one core

    @property
    def end(self) -> float:
        return self.start + self.seconds


async def open_loop(
    client: Client,
    requests: Iterator[bytes],
    arrivals: Sequence[float],
    *,
    warmup: float,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
) -> Run:
    """Send a request at each of `arrivals` (seconds from the start), and wait until all have ended.

    The schedule does not wait for answers: a slow server finds its queue growing, as it would in the field.
    A request the client sends late keeps its scheduled time, so that the delay is in its latency.
    """
    made = [next(requests) for _ in arrivals]
    tasks: list[asyncio.Task[Exchange]] = []
    with quiet_interpreter():
        start = now() + LEAD_S
        meter = _Meter(start + warmup, seconds)
        meter_task = asyncio.create_task(meter.watch())
        for at, request in zip(arrivals, made, strict=True):
            delay = start + at - now()
            # Behind schedule: send at once, but let answers be read in between.
            await asyncio.sleep(delay if delay > FINEST_SLEEP_S else 0)
            tasks.append(asyncio.create_task(client.send(request, start + at)))
            progress(at / (warmup + seconds))
        exchanges = list(await asyncio.gather(*tasks))
        await meter_task
    return Run(exchanges, start + warmup, seconds, meter.share)


async def closed_loop(
    client: Client,
    requests: Iterator[bytes],
    clients: int,
    *,
    warmup: float,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
) -> Run:
    """`clients` who each send their next request when the last is answered, until the window is over."""
    exchanges: list[Exchange] = []
    with quiet_interpreter():
        start = now() + LEAD_S
        end = start + warmup + seconds
        meter = _Meter(start + warmup, seconds)
        meter_task = asyncio.create_task(meter.watch())

        async def one() -> None:
            while now() < end:
                found = await client.send(next(requests))
                exchanges.append(found)
                progress(min(1.0, (now() - start) / (warmup + seconds)))
                if found.error:
                    await asyncio.sleep(0.05)  # a server that refuses must not be hammered

        await asyncio.gather(*(one() for _ in range(clients)))
        await meter_task
    return Run(exchanges, start + warmup, seconds, meter.share)


class _Meter:
    """Processor time of this process within the window."""

    def __init__(self, start: float, seconds: float) -> None:
        self._start, self._seconds = start, seconds
        self.share = 0.0

    async def watch(self) -> None:
        await asyncio.sleep(max(0.0, self._start - now()))
        cpu, clock = time.process_time(), now()
        await asyncio.sleep(max(0.0, self._start + self._seconds - now()))
        self.share = (time.process_time() - cpu) / max(now() - clock, 1e-9)


@contextmanager
def quiet_interpreter() -> Iterator[None]:
    """No garbage collections, which would be taken for the server's pauses."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
