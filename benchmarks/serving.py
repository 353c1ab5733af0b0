"""The server: 64 streams for a minute, what HTTP costs, what a shared beginning gains, and rough treatment.

streams      64 clients stream without a pause: errors, tokens/s, time between tokens, memory, bytes left.
overhead     the same requests over HTTP and through the bare `Engine.generate`, in turns.
prefix       32 chats with one system prompt of 1,024 tokens: time to first token with and without sharing.
restart      kill -9 under load, start again: seconds until `/health` says 200, beside a first start.
disconnect   200 clients who hang up while (or before) they are answered: bytes held after.

The clients run in this process and share the machine's cores with the server; their part is shown. `--quick`
checks that everything works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import time
from collections.abc import Coroutine
from typing import Any

from _common import (
    Claim,
    Sample,
    Table,
    alternate,
    arguments,
    begin,
    finish,
    positive,
    progress,
    rate,
    ratio,
    ratio_text,
)
from _serving import form_of, meter, names, running, until_free, work_off

import trimtab
from trimtab import Engine, SamplingParams
from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.load.client import Client
from trimtab.evaluation.load.lengths import LengthMix
from trimtab.evaluation.load.prompts import Ask, Form, Workload
from trimtab.evaluation.load.reading import read
from trimtab.evaluation.load.run import closed_loop, run_async
from trimtab.evaluation.load.server import ServerProcess
from trimtab.evaluation.load.slo import Slo
from trimtab.evaluation.load.summary import Summary, summarise
from trimtab.sizes import format_bytes

PARTS = ("streams", "overhead", "prefix", "restart", "disconnect")
SLO = Slo.parse("ttft=1s,itl=100ms")


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything")
    parser.add_argument("--clients", type=positive, default=64)
    parser.add_argument("--seconds", type=positive, default=60, help="of the streams")
    parser.add_argument(
        "--intervals", nargs="*", default=["20ms", "0"], help="--stream-interval of the streams"
    )
    parser.add_argument("--requests", type=positive, default=192, help="of a round of the overhead")
    parser.add_argument("--chats", type=positive, default=32, help="with one system prompt")
    parser.add_argument("--system", type=positive, default=1024, help="tokens of the system prompt")
    parser.add_argument("--leavers", type=positive, default=200, help="clients who hang up")
    parser.add_argument("--seed", type=int, default=0)
    options = begin(parser)
    if options.quick:
        options.rounds, options.seconds, options.requests, options.chats = 1, 4, options.clients, 6
    bench = Serving(options)
    for part in PARTS:
        if part in options.parts:
            progress(f"-- {part}")
            getattr(bench, part)()
    finish("serving", bench.tables, bench.claims, {"results": bench.records}, options, options.seed)


class Serving:
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

    # --- streams

    def streams(self) -> None:
        o = self.options
        table = Table(
            f"{o.clients} clients streaming for {o.seconds} s, lengths as of ShareGPT",
            [
                "stream interval",
                "sent",
                "errors",
                "tokens/s",
                "tokens/chunk",
                "TTFT p50",
                "chunk gap p50",
                "p99",
            ]
            + [
                "p99/p50",
                "per token p50",
                "p99",
                "p99/p50",
                "RSS start",
                "middle",
                "end",
                "held after",
                "client CPU",
            ],
        )
        self.records["streams"] = {}
        for interval in o.intervals:
            # The cache's memory is touched for the first time during the warm-up, not in the window.
            plan = f"{self.plan} kv_memory={'64MiB' if o.quick else '192MiB'}"
            with running(plan, words=["--stream-interval", interval]) as server:
                found, memory, held, preempted = self._go(server, self._stream(server))
            chunk, token = (_spread(q.p50, q.p99) for q in (found.itl_chunk, found.itl_token))
            ms = [
                f"{1e3 * (v or 0):.1f} ms" for v in (found.ttft.p50, found.itl_chunk.p50, found.itl_chunk.p99)
            ]
            per = [f"{1e3 * (v or 0):.2f} ms" for v in (found.itl_token.p50, found.itl_token.p99)]
            errors = sum(found.errors.values())
            table.add(
                *(interval, str(found.sent), str(errors), f"{found.output_tokens_per_s:.0f}"),
                *(f"{found.tokens_per_chunk or 0:.2f}", *ms, _times(chunk), *per, _times(token)),
                *(*(format_bytes(m) for m in memory), f"{held} B", f"{found.client_cpu:.0%} of a core"),
            )
            self.records["streams"][interval] = {
                "sent": found.sent,
                "errors": found.errors,
                "tokens_s": found.output_tokens_per_s,
                "ttft": _plain(found.ttft),
                "itl_chunk": _plain(found.itl_chunk),
                "itl_token": _plain(found.itl_token),
                "rss": memory,
                "held_after": held,
                "preemptions": preempted,
                "client_cpu": found.client_cpu,
            }
            name = f"{o.clients} streams, interval {interval}"
            self.claims += [
                Claim(f"{name}: errors", errors, 0, at_most=True),
                Claim(f"{name}: KV bytes held after", held, 0, at_most=True),
                Claim(
                    f"{name}: memory at the end over the middle", memory[2] / memory[1], 1.02, at_most=True
                ),
                Claim(f"{name}: p99 over p50 of the gaps between chunks", chunk, 5, True, "no gaps"),
                Claim(f"{name}: p99 over p50 of the time per token", token, 5, True, "no gaps"),
            ]
        self.tables.append(table)

    async def _stream(self, server: ServerProcess) -> tuple[Summary, list[int], int, int]:
        o, client = self.options, Client(server.url)
        warmup = 2.0 if o.quick else 15.0
        form = await form_of(client)
        asks = self.workload.draw(o.seed)
        requests = (client.request(form.path, form.body(ask)) for ask in asks)
        memory: list[int] = []

        async def watch() -> None:
            await asyncio.sleep(warmup)
            memory.append(server.memory() or 0)
            for _ in range(2):
                await asyncio.sleep(o.seconds / 2)
                memory.append(server.memory() or 0)

        watching = asyncio.create_task(watch())
        run = await closed_loop(client, requests, o.clients, warmup=warmup, seconds=o.seconds)
        await watching
        held, _ = await until_free(client)
        preempted = int(await meter(client, "num_preemptions_total"))
        await client.close()
        answers = [read(exchange, True) for exchange in run.exchanges]
        found = summarise(answers, run.start, run.seconds, SLO, clients=o.clients, client_cpu=run.client_cpu)
        return found, memory, held, preempted

    # --- overhead

    def overhead(self) -> None:
        o = self.options
        # The rounds repeat their prompts, so nobody may remember them.
        plan = f"{self.plan} prefix_caching=false"
        asks = self.asks(o.requests, 1)
        engine = Engine(self.model, plan=trimtab.Plan.of(plan))
        prompts = [ask.text for ask in asks]
        params = [SamplingParams(max_tokens=a.max_tokens, temperature=0.0, ignore_eos=True) for a in asks]
        tokens = sum(ask.max_tokens for ask in asks)
        shares: dict[str, list[float]] = {"streaming": [], "whole answers": []}

        def bare() -> Sample:
            start = time.perf_counter()
            outs = engine.generate(prompts, params)
            seconds = time.perf_counter() - start
            assert sum(len(out.token_ids) for out in outs) == tokens
            return Sample(tokens, seconds)

        with running(plan) as server:

            def over_http(stream: bool, name: str) -> Sample:
                async def one() -> Sample:
                    client = Client(server.url)
                    form = await form_of(client, stream=stream)
                    done = await work_off(client, form, asks, o.clients)
                    await client.close()
                    assert done.tokens == tokens, (done.tokens, tokens)
                    shares[name].append(done.client_cpu / done.seconds)
                    return Sample(tokens, done.seconds)

                return self._go(server, one())

            samples = alternate(
                {
                    "bare engine": bare,
                    "streaming": lambda: over_http(True, "streaming"),
                    "whole answers": lambda: over_http(False, "whole answers"),
                },
                o.rounds,
            )
        table = Table(
            f"{o.requests} requests, {tokens} tokens, {o.clients} at once",
            ["through", "tokens/s", "of the bare engine", "client CPU", "of all cores"],
        )
        table.add("bare Engine.generate", f"{rate(samples['bare engine']):.0f}", "-", "-", "-")
        self.records["overhead"] = {"bare engine": {"tokens_s": rate(samples["bare engine"])}}
        for name, share in shares.items():
            compared = ratio(samples[name], samples["bare engine"])
            cpu = statistics.median(share)
            of_all = cpu / len(os.sched_getaffinity(0))
            table.add(
                *(f"HTTP, {name}", f"{rate(samples[name]):.0f}", ratio_text(compared)),
                *(f"{cpu:.0%} of a core", f"{of_all:.1%}"),
            )
            self.records["overhead"][name] = {
                "tokens_s": rate(samples[name]),
                "of_bare_engine": compared,
                "client_cpu": cpu,
            }
            self.claims.append(
                Claim(f"HTTP, {name}: throughput over the bare engine's", compared["median"], 0.9)
            )
        self.tables.append(table)

    # --- prefix

    def prefix(self) -> None:
        o = self.options
        table = Table(
            f"{o.chats} chats with one system prompt of {o.system} tokens, TTFT",
            ["prefix caching", "one after another, median", "all at once, median", "all at once, last"],
        )
        with running(self.plan, f"{self.plan} prefix_caching=false") as server:
            found = self._go(server, self._prefix(server))
        gains: dict[str, float] = {}
        for which, heading in (
            ("alone", "one after another"),
            ("burst", "all at once"),
            ("last", "last of all at once"),
        ):
            gains[which] = statistics.median(
                off / on for off, on in zip(found["off"][which], found["on"][which], strict=True)
            )
            self.claims.append(Claim(f"TTFT without prefix caching over with it, {heading}", gains[which], 5))
        for name in ("on", "off"):
            cells = [f"{1e3 * statistics.median(found[name][w]):.2f} ms" for w in ("alone", "burst", "last")]
            table.add(name, *cells)
        table.add("gain", *(f"{gains[w]:.1f}x" for w in ("alone", "burst", "last")))
        self.tables.append(table)
        self.records["prefix"] = {"ttft": found, "gain": gains}

    async def _prefix(self, server: ServerProcess) -> dict[str, dict[str, list[float]]]:
        """Median TTFT of each round, taken in turns; each round has a system prompt of its own."""
        o, client = self.options, Client(server.url)
        with_it, without = await names(client)
        found: dict[str, dict[str, list[float]]] = {
            name: {"alone": [], "burst": [], "last": []} for name in ("on", "off")
        }
        ids = self.tokenizer.encode(shipped_text())
        for index in range(o.rounds + 1):
            system = self.tokenizer.decode(ids[(start := index * o.system) : start + o.system])
            for name, model in (("on", with_it), ("off", without)):
                form = Form(model, True)
                bodies = [_chat(form, system, f"Question {i}: what happened next?") for i in range(o.chats)]
                requests = [client.request(form.path, body) for body in bodies]
                alone = [read(await client.send(request), True) for request in requests]
                burst = [read(e, True) for e in await asyncio.gather(*map(client.send, requests))]
                failed = [a.error for a in (*alone, *burst) if a.error]
                if failed:
                    raise RuntimeError(f"a chat failed: {failed[0]}")
                if index:  # the first round warms up
                    found[name]["alone"].append(statistics.median(a.ttft or 0.0 for a in alone))
                    found[name]["burst"].append(statistics.median(a.ttft or 0.0 for a in burst))
                    found[name]["last"].append(max(a.ttft or 0.0 for a in burst))
        await client.close()
        return found

    # --- rough treatment

    def restart(self) -> None:
        o = self.options
        first: list[float] = []
        again: list[float] = []
        for index in range(o.rounds + 1):
            server = ServerProcess(["--plan", self.plan])
            start = time.perf_counter()
            server.start()
            server.wait(900.0)
            loading = time.perf_counter() - start
            self._go(server, self._kill_under_load(server))
            successor = ServerProcess(["--plan", self.plan])
            successor.port, successor.url = server.port, server.url
            start = time.perf_counter()
            successor.start()
            try:
                successor.wait(900.0)
                seconds = time.perf_counter() - start
                self._go(successor, self._one_answer(successor))
            finally:
                successor.stop()
            if index:  # the first start reads the files from the disk
                first.append(loading)
                again.append(seconds)
        table = Table("Until /health says 200", ["start", "median", "least", "greatest"])
        for name, values in (("first", first), ("after kill -9 under load, same port", again)):
            table.add(name, *(f"{v:.2f} s" for v in (statistics.median(values), min(values), max(values))))
        self.tables.append(table)
        slower = statistics.median(b / a for a, b in zip(first, again, strict=True))
        self.records["restart"] = {"first_s": first, "again_s": again, "slower": slower}
        self.claims.append(Claim("start after kill -9 over a first start", slower, 1.1, at_most=True))

    async def _kill_under_load(self, server: ServerProcess) -> None:
        client = Client(server.url)
        form = await form_of(client)
        asks = [Ask(a.text, a.prompt_tokens, 1500 - a.prompt_tokens) for a in self.asks(8, 2)]
        streams = [asyncio.create_task(client.send(client.request(form.path, form.body(a)))) for a in asks]
        await asyncio.sleep(0.3)
        server.kill()
        ended = [exchange.error for exchange in await asyncio.gather(*streams)]
        assert any(ended), "the streams ended before the server was killed"
        await client.close()

    async def _one_answer(self, server: ServerProcess) -> None:
        client = Client(server.url)
        done = await work_off(client, await form_of(client), [Ask("Once upon a time", 4, 8)], 1)
        assert done.tokens == 8
        await client.close()

    def disconnect(self) -> None:
        o = self.options
        with running(self.plan, words=["--stream-interval", "0"]) as server:
            rounds = [self._go(server, self._leave(server, i)) for i in range(o.rounds)]
        held, seconds, waiting = (max(r[i] for r in rounds) for i in range(3))
        table = Table(
            f"{o.leavers} clients who hang up",
            ["KV bytes held after", "running or waiting", "free after the last"],
        )
        table.add(f"{held:.0f} B", f"{waiting:.0f}", f"{1e3 * seconds:.0f} ms")
        self.tables.append(table)
        self.records["disconnect"] = {"held_after": held, "free_after_s": seconds, "left_over": waiting}
        self.claims += [
            Claim(f"{o.leavers} clients hang up: KV bytes held after", held, 0, at_most=True),
            Claim(f"{o.leavers} clients hang up: requests left over", waiting, 0, at_most=True),
        ]

    async def _leave(self, server: ServerProcess, index: int) -> tuple[float, float, float]:
        """Everybody wants a long answer and leaves after some chunks, one in ten before the first."""
        o, client, rng = self.options, Client(server.url), random.Random(self.options.seed + index)
        form = await form_of(client)
        asks = [Ask(a.text, a.prompt_tokens, 1500 - a.prompt_tokens) for a in self.asks(o.leavers, 3 + index)]
        leave_after = [rng.randrange(1, 30) if i % 10 else 0 for i in range(o.leavers)]
        exchanges = await asyncio.gather(
            *(
                client.send(client.request(form.path, form.body(ask)), hang_up_after=after)
                for ask, after in zip(asks, leave_after, strict=True)
            )
        )
        told = [e.error for e in exchanges if e.error != "connection lost"]
        assert not told, f"{len(told)} were answered otherwise: {told[0]}"
        held, seconds = await until_free(client)
        left = await meter(client, "num_requests_running") + await meter(client, "num_requests_waiting")
        await self._one_answer(server)
        await client.close()
        return held, seconds, left

    @staticmethod
    def _go(server: ServerProcess, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work`; if it fails because the server ended, say the server's last words."""
        try:
            return run_async(work)
        except Exception:
            if server.process is not None and server.process.poll() is not None:
                progress(f"the server ended: {server.last_words()}")
            raise


def _chat(form: Form, system: str, question: str) -> bytes:
    import json

    fields = json.loads(form.body(Ask(question, 0, 4)))
    fields["messages"].insert(0, {"role": "system", "content": system})
    return json.dumps(fields).encode()


def _spread(p50: float | None, p99: float | None) -> float | None:
    return p99 / p50 if p50 and p99 is not None else None


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _plain(quantiles: Any) -> dict[str, float | None]:
    return {name: getattr(quantiles, name) for name in ("mean", "p50", "p95", "p99", "max")}


if __name__ == "__main__":
    main()
