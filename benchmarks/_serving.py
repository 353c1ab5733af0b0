"""What `serving.py` needs around its questions: a server, its meters, and clients who work off a list."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from _common import Claim, Table, progress

import trimtab
from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.load.client import Client, Exchange
from trimtab.evaluation.load.lengths import LengthMix
from trimtab.evaluation.load.prompts import Ask, Form, Workload
from trimtab.evaluation.load.reading import Answer, read
from trimtab.evaluation.load.run import quiet_interpreter, run_async
from trimtab.evaluation.load.server import ServerProcess, served

LOADING_S = 900.0  # the first start may compile the kernels

T = TypeVar("T")


class Bench:
    """The options, the requests that all parts draw from, and what the parts have found out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tables: list[Table] = []
        self.claims: list[Claim] = []
        self.records: dict[str, Any] = {}
        self.plan = f"full threads={options.threads} max_batch={options.clients}"
        model = trimtab.load()
        assert model.tokenizer is not None
        self.model, self.tokenizer = model, model.tokenizer
        text = shipped_text()
        per_token = len(text) / len(model.tokenizer.encode(text))
        self.workload = Workload(LengthMix(), model.config.context_length, per_token, text)

    def asks(self, count: int, seed: int) -> list[Ask]:
        return list(itertools.islice(self.workload.draw(self.options.seed + seed), count))

    def long_asks(self, count: int, seed: int) -> list[Ask]:
        """As `asks`, but wanting so much that nobody is done soon."""
        return [Ask(a.text, a.prompt_tokens, 1500 - a.prompt_tokens) for a in self.asks(count, seed)]


def go(server: ServerProcess, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; if it fails because the server has ended, tell the server's last words."""
    try:
        return run_async(work)
    except Exception:
        if server.process is not None and server.process.poll() is not None:
            progress(f"the server ended: {server.last_words()}")
        raise


@contextmanager
def running(*plans: str, words: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """A server with the shipped model under `plans`, ready."""
    listed = [word for plan in plans for word in ("--plan", plan)]
    server = ServerProcess([*listed, "--no-log-requests", *words])
    server.start()
    try:
        server.wait(LOADING_S)
        yield server
    finally:
        server.stop()


async def names(client: Client) -> list[str]:
    """The served names in the plans' order."""
    return [model["id"] for model in json.loads((await client.get("/v1/models")).body)["data"]]


async def meter(client: Client, name: str) -> float:
    """A gauge of `/metrics`, summed over the served models."""
    text = (await client.get("/metrics")).body.decode()
    values = re.findall(rf"^trimtab_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    if not values:
        raise RuntimeError(f"/metrics has no trimtab_{name}")
    return sum(map(float, values))


async def until_free(client: Client, limit_s: float = 10.0) -> tuple[int, float]:
    """KV bytes still held when nothing runs any more (or after `limit_s`), and the seconds that took."""
    start = time.perf_counter()
    while True:
        held = int(await meter(client, "kv_bytes_held"))
        seconds = time.perf_counter() - start
        if held == 0 or seconds > limit_s:
            return held, seconds
        await asyncio.sleep(0.002)


async def form_of(
    client: Client, name: str | None = None, *, chat: bool = False, stream: bool = True
) -> Form:
    return Form((await served(client, name)).name, chat, stream)


@dataclass(frozen=True, slots=True)
class Work:
    """Requests worked off by some clients: tokens, wall seconds, the clients' CPU seconds, answers."""

    tokens: int
    seconds: float
    client_cpu: float
    answers: list[Answer]


async def work_off(client: Client, form: Form, asks: Sequence[Ask], clients: int) -> Work:
    """`clients` who each take the next of `asks` when their last one is answered, until none is left."""
    waiting = [client.request(form.path, form.body(ask)) for ask in reversed(asks)]
    exchanges: list[Exchange] = []

    async def one() -> None:
        while waiting:
            exchanges.append(await client.send(waiting.pop()))

    with quiet_interpreter():
        cpu, start = time.process_time(), time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    answers = [read(exchange, form.stream) for exchange in exchanges]
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(asks)} requests failed, the first: {failed[0]}")
    return Work(sum(a.output_tokens or 0 for a in answers), seconds, cpu, answers)
