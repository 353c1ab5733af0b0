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

import asyncio
import json
import statistics

from _common import Claim, Table, arguments, begin, finish, positive, progress
from _serving import Bench, go, names, running
from _serving_load import overhead, streams
from _serving_rough import disconnect, restart

from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.load.client import Client
from trimtab.evaluation.load.prompts import Ask, Form
from trimtab.evaluation.load.reading import read
from trimtab.evaluation.load.server import ServerProcess


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
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
    bench = Bench(options)
    for part in PARTS:
        if part in options.parts:
            progress(f"-- {part}")
            PARTS[part](bench)
    finish("serving", bench.tables, bench.claims, {"results": bench.records}, options, options.seed)


def prefix(bench: Bench) -> None:
    o = bench.options
    table = Table(
        f"{o.chats} chats with one system prompt of {o.system} tokens, TTFT",
        ["prefix caching", "one after another, median", "all at once, median", "all at once, last"],
    )
    with running(bench.plan, f"{bench.plan} prefix_caching=false") as server:
        found = go(server, _prefix(bench, server))
    gains: dict[str, float] = {}
    for which, heading in (
        ("alone", "one after another"),
        ("burst", "all at once"),
        ("last", "last of all at once"),
    ):
        gains[which] = statistics.median(
            off / on for off, on in zip(found["off"][which], found["on"][which], strict=True)
        )
        bench.claims.append(Claim(f"TTFT without prefix caching over with it, {heading}", gains[which], 5))
    for name in ("on", "off"):
        cells = [f"{1e3 * statistics.median(found[name][w]):.2f} ms" for w in ("alone", "burst", "last")]
        table.add(name, *cells)
    table.add("gain", *(f"{gains[w]:.1f}x" for w in ("alone", "burst", "last")))
    bench.tables.append(table)
    bench.records["prefix"] = {"ttft": found, "gain": gains}


async def _prefix(bench: Bench, server: ServerProcess) -> dict[str, dict[str, list[float]]]:
    """Median TTFT of each round, taken in turns; each round has a system prompt of its own."""
    o, client = bench.options, Client(server.url)
    with_it, without = await names(client)
    found: dict[str, dict[str, list[float]]] = {
        name: {"alone": [], "burst": [], "last": []} for name in ("on", "off")
    }
    ids = bench.tokenizer.encode(shipped_text())
    for index in range(o.rounds + 1):
        system = bench.tokenizer.decode(ids[(start := index * o.system) : start + o.system])
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


def _chat(form: Form, system: str, question: str) -> bytes:
    fields = json.loads(form.body(Ask(question, 0, 4)))
    fields["messages"].insert(0, {"role": "system", "content": system})
    return json.dumps(fields).encode()


PARTS = {
    "streams": streams,
    "overhead": overhead,
    "prefix": prefix,
    "restart": restart,
    "disconnect": disconnect,
}

if __name__ == "__main__":
    main()
