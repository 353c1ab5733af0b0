"""`serving.py`: rough treatment, that is kill -9 and clients who hang up."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter

from _common import Claim, Table
from _serving import LOADING_S, Bench, form_of, go, meter, running, until_free, work_off

from trimtab.evaluation.load.client import Client
from trimtab.evaluation.load.prompts import Ask
from trimtab.evaluation.load.reading import read
from trimtab.evaluation.load.server import ServerProcess


def restart(bench: Bench) -> None:
    o = bench.options
    first: list[float] = []
    again: list[float] = []
    for index in range(o.rounds + 1):
        server = ServerProcess(["--plan", bench.plan])
        start = time.perf_counter()
        server.start()
        server.wait(LOADING_S)
        loading = time.perf_counter() - start
        go(server, _kill_under_load(bench, server))
        successor = ServerProcess(["--plan", bench.plan])
        successor.port, successor.url = server.port, server.url
        start = time.perf_counter()
        successor.start()
        try:
            successor.wait(LOADING_S)
            seconds = time.perf_counter() - start
            go(successor, _one_answer(successor))
        finally:
            successor.stop()
        if index:  # the first start reads the files from the disk
            first.append(loading)
            again.append(seconds)
    table = Table("Until /health says 200", ["start", "median", "least", "greatest"])
    for name, values in (("first", first), ("after kill -9 under load, same port", again)):
        table.add(name, *(f"{v:.2f} s" for v in (statistics.median(values), min(values), max(values))))
    bench.tables.append(table)
    slower = statistics.median(b / a for a, b in zip(first, again, strict=True))
    bench.records["restart"] = {"first_s": first, "again_s": again, "slower": slower}
    bench.claims.append(Claim("start after kill -9 over a first start", slower, 1.1, at_most=True))


async def _kill_under_load(bench: Bench, server: ServerProcess) -> None:
    client = Client(server.url)
    form = await form_of(client)
    asks = bench.long_asks(8, 2)
    streams = [asyncio.create_task(client.send(client.request(form.path, form.body(a)))) for a in asks]
    await asyncio.sleep(0.3)
    server.kill()
    ended = [exchange.error for exchange in await asyncio.gather(*streams)]
    assert any(ended), "the streams ended before the server was killed"
    await client.close()


async def _one_answer(server: ServerProcess) -> None:
    client = Client(server.url)
    done = await work_off(client, await form_of(client), [Ask("Once upon a time", 4, 8)], 1)
    assert done.tokens == 8
    await client.close()


def disconnect(bench: Bench) -> None:
    o = bench.options
    # Everybody is let in: what is asked is what leaving does, not where the queue ends.
    words = ["--stream-interval", "0", "--max-queue", str(4 * o.leavers)]
    with running(bench.plan, words=words) as server:
        rounds = [go(server, _leave(bench, server, i)) for i in range(o.rounds)]
    held, seconds, waiting = (max(r[i] for r in rounds) for i in range(3))
    table = Table(
        f"{o.leavers} clients who hang up",
        ["KV bytes held after", "running or waiting", "free after the last"],
    )
    table.add(f"{held:.0f} B", f"{waiting:.0f}", f"{1e3 * seconds:.0f} ms")
    bench.tables.append(table)
    bench.records["disconnect"] = {"held_after": held, "free_after_s": seconds, "left_over": waiting}
    bench.claims += [
        Claim(f"{o.leavers} clients hang up: KV bytes held after", held, 0, at_most=True),
        Claim(f"{o.leavers} clients hang up: requests left over", waiting, 0, at_most=True),
    ]


async def _leave(bench: Bench, server: ServerProcess, index: int) -> tuple[float, float, float]:
    """Everybody wants a long answer and leaves after some chunks, one in ten before the first."""
    o, client, rng = bench.options, Client(server.url), random.Random(bench.options.seed + index)
    form = await form_of(client)
    asks = bench.long_asks(o.leavers, 3 + index)
    leave_after = [rng.randrange(1, 30) if i % 10 else 0 for i in range(o.leavers)]
    exchanges = await asyncio.gather(
        *(
            client.send(client.request(form.path, form.body(ask)), hang_up_after=after)
            for ask, after in zip(asks, leave_after, strict=True)
        )
    )
    told = Counter(read(e, True).error or "a whole answer" for e in exchanges)
    del told["connection lost"]
    assert not told, f"some did not get to hang up: {dict(told)}"
    held, seconds = await until_free(client)
    left = await meter(client, "num_requests_running") + await meter(client, "num_requests_waiting")
    await _one_answer(server)
    await client.close()
    return held, seconds, left
