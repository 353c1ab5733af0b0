"""`serving.py`: many streams at once, and what HTTP costs."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from dataclasses import asdict

from _common import Claim, Sample, Table, alternate, rate, ratio, ratio_text
from _serving import Bench, form_of, go, meter, running, until_free, work_off

import trimtab
from trimtab import Engine, SamplingParams
from trimtab.evaluation.load.client import Client
from trimtab.evaluation.load.reading import read
from trimtab.evaluation.load.run import closed_loop
from trimtab.evaluation.load.server import ServerProcess
from trimtab.evaluation.load.slo import Slo
from trimtab.evaluation.load.summary import Summary, summarise
from trimtab.sizes import format_bytes

SLO = Slo.parse("ttft=1s,itl=100ms")


def streams(bench: Bench) -> None:
    o = bench.options
    table = Table(
        f"{o.clients} clients streaming for {o.seconds} s, lengths as of ShareGPT",
        ["interval", "sent", "errors", "tokens/s", "tokens/chunk", "TTFT p50"]
        + ["chunk gap p50", "p99", "p99/p50", "per token p50", "p99", "p99/p50"],
    )
    memories = Table(
        "The same: the server's memory and the clients' part",
        ["interval", "RSS at the start", "middle", "end", "KV held after", "preemptions", "client CPU"],
    )
    bench.records["streams"] = {}
    for interval in o.intervals:
        # The cache's memory is touched for the first time during the warm-up, not in the window.
        plan = f"{bench.plan} kv_memory={'64MiB' if o.quick else '192MiB'}"
        with running(plan, words=["--stream-interval", interval]) as server:
            found, memory, held, preempted = go(server, _stream(bench, server))
        chunk, token = (_spread(q.p50, q.p99) for q in (found.itl_chunk, found.itl_token))
        ms = [f"{1e3 * (v or 0):.1f} ms" for v in (found.ttft.p50, found.itl_chunk.p50, found.itl_chunk.p99)]
        per = [f"{1e3 * (v or 0):.2f} ms" for v in (found.itl_token.p50, found.itl_token.p99)]
        errors = sum(found.errors.values())
        table.add(
            *(interval, str(found.sent), str(errors), f"{found.output_tokens_per_s:.0f}"),
            *(f"{found.tokens_per_chunk or 0:.2f}", *ms, _times(chunk), *per, _times(token)),
        )
        memories.add(
            *(interval, *(format_bytes(rss) for rss, _ in memory), f"{held} B", str(preempted)),
            f"{found.client_cpu:.0%} of a core",
        )
        bench.records["streams"][interval] = {
            "sent": found.sent,
            "errors": found.errors,
            "tokens_s": found.output_tokens_per_s,
            "ttft": asdict(found.ttft),
            "itl_chunk": asdict(found.itl_chunk),
            "itl_token": asdict(found.itl_token),
            "rss": [rss for rss, _ in memory],
            "kv_touched": [kv for _, kv in memory],
            "held_after": held,
            "preemptions": preempted,
            "client_cpu": found.client_cpu,
        }
        # The arena's pages are the system's until a block is used for the first time: that is no leak.
        rest = [rss - kv for rss, kv in memory]
        name = f"{o.clients} streams, interval {interval}"
        bench.claims += [
            Claim(f"{name}: errors", errors, 0, at_most=True),
            Claim(f"{name}: KV bytes held after", held, 0, at_most=True),
            Claim(f"{name}: memory but the cache's, end over middle", rest[2] / rest[1], 1.02, at_most=True),
            Claim(f"{name}: p99 over p50 of the gaps between chunks", chunk, 5, True, "no gaps"),
            Claim(f"{name}: p99 over p50 of the time per token", token, 5, True, "no gaps"),
        ]
    bench.tables += [table, memories]


async def _stream(bench: Bench, server: ServerProcess) -> tuple[Summary, list[tuple[int, int]], int, int]:
    o, client = bench.options, Client(server.url)
    warmup = 2.0 if o.quick else 15.0
    form = await form_of(client)
    asks = bench.workload.draw(o.seed)
    requests = (client.request(form.path, form.body(ask)) for ask in asks)
    memory: list[tuple[int, int]] = []

    async def watch() -> None:
        touched = 0
        for pause in (warmup, o.seconds / 2, o.seconds / 2):
            await asyncio.sleep(pause)
            kv = await meter(client, "kv_bytes_held") + await meter(client, "kv_bytes_cached")
            touched = max(touched, int(kv))
            memory.append((server.memory() or 0, touched))

    watching = asyncio.create_task(watch())
    run = await closed_loop(client, requests, o.clients, warmup=warmup, seconds=o.seconds)
    await watching
    held, _ = await until_free(client)
    preempted = int(await meter(client, "num_preemptions_total"))
    await client.close()
    answers = [read(exchange, True) for exchange in run.exchanges]
    found = summarise(answers, run.start, run.seconds, SLO, clients=o.clients, client_cpu=run.client_cpu)
    return found, memory, held, preempted


def overhead(bench: Bench) -> None:
    o = bench.options
    # The rounds repeat their prompts, so nobody may remember them.
    plan = f"{bench.plan} prefix_caching=false"
    asks = bench.asks(o.requests, 1)
    engine = Engine(bench.model, plan=trimtab.Plan.of(plan))
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

            return go(server, one())

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
    bench.records["overhead"] = {"bare engine": {"tokens_s": rate(samples["bare engine"])}}
    for name, share in shares.items():
        compared = ratio(samples[name], samples["bare engine"])
        cpu = statistics.median(share)
        of_all = cpu / len(os.sched_getaffinity(0))
        table.add(
            *(f"HTTP, {name}", f"{rate(samples[name]):.0f}", ratio_text(compared)),
            *(f"{cpu:.0%} of a core", f"{of_all:.1%}"),
        )
        bench.records["overhead"][name] = {
            "tokens_s": rate(samples[name]),
            "of_bare_engine": compared,
            "client_cpu": cpu,
        }
        bench.claims.append(
            Claim(f"HTTP, {name}: throughput over the bare engine's", compared["median"], 0.9)
        )
    bench.tables.append(table)


def _spread(p50: float | None, p99: float | None) -> float | None:
    return p99 / p50 if p50 and p99 is not None else None


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"
