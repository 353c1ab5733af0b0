"""Many requests with one long beginning: attending to it together, against everybody alone.

Every engine has the same requests under way and all take turns decoding. `shared` is the full cache as it
is: a beginning is held once and each step reads it once for all that share it. `alone` is the same cache
with `hydragen=false`: held once, read by every request. `own copies` has no prefix caching: every request
computes, holds and reads all of it.

The first table is decoding end to end, the shipped model (stretched to the length; speed only) and a random
model in which attention weighs more, with requests that share one prefix and with a tree: a system prompt,
sub-prompts, and requests below each. `logits` is the largest absolute difference to `shared` over each
request's first tokens. The second table is attention by itself, all layers over the same held rows with and
without sharing, for more lengths and batches.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import _models
import torch
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
    token_seconds,
)
from _under_way import UnderWay

from trimtab import Engine, Model
from trimtab.kernels.native import Library
from trimtab.models.costs import kv_bytes_per_token
from trimtab.models.shapes import random_model, shape
from trimtab.sizes import format_bytes

KINDS: dict[str, dict[str, Any]] = {
    "shared": {"cache": "full"},
    "alone": {"cache": "full:hydragen=false"},
    "own copies": {"cache": "full:hydragen=false", "prefix_caching": False},
}
COMPARED = 4  # tokens of each text whose logits are compared
Kept = dict[tuple[int, int], torch.Tensor]  # logits by number of the request and position


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--models", nargs="*", default=["shipped", "random"], choices=["shipped", "random"])
    parser.add_argument("--prefix", type=positive, default=4096, help="tokens that all requests share")
    parser.add_argument("--suffix", type=positive, default=32, help="tokens of a request's own")
    parser.add_argument("--requests", type=positive, default=32)
    parser.add_argument("--tokens", type=positive, default=16, help="decoded by each request in a round")
    parser.add_argument("--sub-prompts", type=positive, default=4, help="of the tree, half a prefix each")
    parser.add_argument(
        "--no-copies", action="store_true", help="without the row `own copies`, which is slow"
    )
    parser.add_argument("--prefixes", nargs="*", type=positive, default=[512, 2048, 4096, 16384])
    parser.add_argument("--batches", nargs="*", type=positive, default=[8, 32])
    parser.add_argument("--seed", type=int, default=0)
    options = begin(parser)
    if options.suffix < 2:
        parser.error("--suffix must be at least 2")
    if options.requests % options.sub_prompts:
        parser.error(f"--sub-prompts {options.sub_prompts} does not divide --requests {options.requests}")

    bench = Hydragen(options)
    for name in options.models:
        model = bench.model(name, options.prefix + options.suffix)
        bench.decode(name, "one prefix", model, bench.one_prefix(), not options.no_copies)
        bench.decode(name, "tree", model, bench.tree(), False)
    for prefix in options.prefixes:
        bench.attention(prefix)
    bench.finish()


@dataclass(frozen=True)
class Requests:
    prompts: list[list[int]]
    warm_ups: list[list[int]]  # what must have been served before, so that beginnings are there to be shared


class Hydragen:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rng = random.Random(options.seed)
        self.table = Table(
            f"{options.requests} requests, {options.dtype}: decoding",
            [
                *("model", "requests share", "engine", "tokens/s", "ms / step", "KV held"),
                *("KV read / step", "shared is faster", "logits"),
            ],
        )
        self.sweep = Table(
            "Attention of one step by itself, the shipped model's heads and layers",
            ["prefix", "requests", "alone ms", "shared ms", "shared is faster", "KV read alone", "shared"],
        )
        self.records: list[dict[str, Any]] = []
        self.sweep_records: list[dict[str, Any]] = []

    def model(self, name: str, length: int) -> Model:
        """`shipped`, stretched far enough, or `random`: small matrices and many KV heads."""
        o = self.options
        # Room for a whole tree, the rounds, and what requests decode until the last one has begun.
        context = 1 << (length + (o.rounds + 2) * o.tokens + 4 * o.requests + COMPARED).bit_length()
        if name == "shipped":
            return _models.variant(o.dtype, max(_models.TRAINED, context))
        config = shape(
            "125m",
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=4096,
            max_position_embeddings=context,
        )
        return random_model(config, o.dtype)

    # --- who shares what

    def _ids(self, count: int) -> list[int]:
        return [self.rng.randrange(16, 4096) for _ in range(count)]

    def one_prefix(self) -> Requests:
        o = self.options
        prefix = self._ids(o.prefix)
        return Requests([prefix + self._ids(o.suffix) for _ in range(o.requests)], [prefix + self._ids(1)])

    def tree(self) -> Requests:
        """A system prompt of half the prefix, sub-prompts of the other half, requests below each of them."""
        o = self.options
        system = self._ids(o.prefix // 2)
        subs = [system + self._ids(o.prefix - o.prefix // 2) for _ in range(o.sub_prompts)]
        prompts = [subs[i % len(subs)] + self._ids(o.suffix) for i in range(o.requests)]
        return Requests(prompts, [sub + self._ids(1) for sub in subs])

    # --- decoding

    def _start(self, model: Model, requests: Requests, kind: str) -> tuple[UnderWay, Kept]:
        o = self.options
        prompts = requests.prompts
        longest = len(prompts[0]) + 1024
        copies = len(prompts) if kind == "own copies" else 1 + len(requests.warm_ups)
        tokens = copies * longest + len(prompts) * (o.suffix + 1024)
        engine = Engine(
            model,
            threads=o.threads,
            max_batch=len(prompts),
            kv_memory=tokens * kv_bytes_per_token(model.config, model.dtype.itemsize),
            **KINDS[kind],
        )
        warm_ups = requests.warm_ups if kind != "own copies" else [prompts[0][:64]]
        for warm_up in warm_ups[:-1]:
            engine.generate(warm_up)
        logits = Logits(engine, len(prompts[0]))
        texts = UnderWay(engine, prompts, warm_ups[-1])
        texts.decode(COMPARED)
        del engine.runner.run  # the class's own again
        return texts, logits.by_text(texts)

    def decode(self, name: str, what: str, model: Model, requests: Requests, copies: bool) -> None:
        """All engines on the same requests, and their rows."""
        o = self.options
        texts: dict[str, UnderWay] = {}
        logits: dict[str, Kept] = {}
        for kind in KINDS if copies else list(KINDS)[:2]:
            progress(f"{name}, {what}: {len(requests.prompts)} prompts for {kind}")
            texts[kind], logits[kind] = self._start(model, requests, kind)
        turns = {kind: (lambda t=t: t.decode(o.tokens)) for kind, t in texts.items()}
        samples = alternate(turns, o.rounds)
        for kind, t in texts.items():
            assert logits[kind].keys() == logits["shared"].keys()
            pairs = [(logits[kind][key], logits["shared"][key]) for key in logits[kind]]
            difference = max(float((a - b).abs().max()) for a, b in pairs)
            self._add(name, what, kind, t, samples, difference)
        for t in texts.values():
            t.close()

    def _add(
        self,
        name: str,
        what: str,
        kind: str,
        texts: UnderWay,
        samples: dict[str, list[Sample]],
        difference: float,
    ) -> None:
        faster = None if kind == "shared" else ratio(samples["shared"], samples[kind])
        read = texts.read_per_step if kind != "shared" else _read_together(texts.engine, texts)
        held = texts.engine.stats().kv_bytes_held
        step = token_seconds(samples[kind]) or 0.0
        self.records.append(
            {
                "model": name,
                "requests": what,
                "engine": kind,
                "tokens_s": rate(samples[kind]),
                "rounds": [s.rate for s in samples[kind]],
                "step_ms": 1e3 * step,
                "kv_held": held,
                "kv_read_per_step": read,
                "shared_is_faster": faster,
                "logits_difference": difference,
            }
        )
        self.table.add(
            name,
            what,
            kind,
            f"{rate(samples[kind]):.0f}",
            f"{1e3 * step:.2f}",
            format_bytes(held),
            format_bytes(read),
            ratio_text(faster),
            "-" if kind == "shared" else f"{difference:.1g}",
        )

    # --- attention by itself

    def attention(self, prefix: int) -> None:
        """Attention of one step over the same rows, with and without sharing, at each batch."""
        o = self.options
        most = max(o.batches)
        model = self.model("shipped", prefix + o.suffix)
        beginning = self._ids(prefix)
        requests = Requests([beginning + self._ids(o.suffix) for _ in range(most)], [beginning + [16]])
        progress(f"attention by itself: prefix of {prefix}")
        texts, _ = self._start(model, requests, "shared")
        for batch in o.batches:
            self._attention(texts, prefix, batch)
        texts.close()

    def _attention(self, texts: UnderWay, prefix: int, batch: int) -> None:
        shared = texts.requests[:batch]
        ways = {kind: list(_layers(texts.engine, shared, kind == "shared")) for kind in ("alone", "shared")}
        kernels = texts.engine.cache.shape.kernels
        s = texts.engine.cache.shape
        q = torch.randn(batch, s.num_heads, s.head_dim, generator=torch.Generator().manual_seed(0))
        times: dict[str, list[float]] = {kind: [] for kind in ways}
        for number in range(self.options.rounds + 1):
            for kind, calls in ways.items():
                start = time.perf_counter()
                for _ in range(4):
                    for call in calls:
                        kernels.attend(call, q)
                if number:  # the first round warms up
                    times[kind].append((time.perf_counter() - start) / 4)
        each = [a / b for a, b in zip(times["alone"], times["shared"], strict=True)]
        faster = {"median": statistics.median(each), "min": min(each), "max": max(each)}
        alone, together = (
            sum(texts.engine.cache.read_per_step(r.sequence) for r in shared if r.sequence),
            _read_together(texts.engine, texts, batch),
        )
        ms = {kind: 1e3 * statistics.median(taken) for kind, taken in times.items()}
        self.sweep_records.append(
            {
                "prefix": prefix,
                "requests": batch,
                "ms": ms,
                "shared_is_faster": faster,
                "kv_read_alone": alone,
                "kv_read_shared": together,
            }
        )
        self.sweep.add(
            str(prefix),
            str(batch),
            f"{ms['alone']:.2f}",
            f"{ms['shared']:.2f}",
            ratio_text(faster),
            format_bytes(alone),
            format_bytes(together),
        )

    # --- claims

    def claims(self) -> list[Claim]:
        found = []
        for record in self.records:
            if record["engine"] != "shared":
                where = f"{record['model']}, {record['requests']}: shared over {record['engine']}"
                if record["requests"] == "one prefix":
                    found.append(Claim(f"{where}, speed", record["shared_is_faster"]["median"], 4.0))
                found.append(
                    Claim(
                        f"{where}, largest logits difference", record["logits_difference"], 1e-5, at_most=True
                    )
                )
        for record in self.sweep_records:
            if record["prefix"] == 4096 and record["requests"] == 32:
                faster = record["shared_is_faster"]["median"]
                found.append(Claim("attention by itself, 32 requests on 4096 tokens, speed", faster, 4.0))
        return found

    def finish(self) -> None:
        record = {"results": self.records, "attention": self.sweep_records}
        finish("hydragen", [self.table, self.sweep], self.claims(), record, self.options, self.options.seed)


class Logits:
    """Keeps the logits of the first tokens of every text that an engine serves."""

    def __init__(self, engine: Engine, prompt: int) -> None:
        self.found: dict[tuple[int, int], torch.Tensor] = {}  # by slot and position
        run = engine.runner.run

        def keep(picks: Any, logit_rows: list[int], **options: Any) -> Any:
            out = run(picks, logit_rows, **options)
            for row, logits in zip(logit_rows, out.logits, strict=True):
                owner = next(i for i, (first, end) in enumerate(out.rows.bounds) if first <= row < end)
                sequence, position = out.rows.sequences[owner], int(out.rows.positions[row])
                # Warm-ups are of another length.
                if sequence.prompt_length == prompt and position < prompt - 1 + COMPARED:
                    self.found[sequence.slot, position] = logits.clone()
            return out

        engine.runner.run = keep  # type: ignore[method-assign]

    def by_text(self, texts: UnderWay) -> Kept:
        """By number of the request and position."""
        number = {r.sequence.slot: i for i, r in enumerate(texts.requests) if r.sequence}
        return {(number[slot], position): x for (slot, position), x in self.found.items()}


def _layers(engine: Engine, requests: Sequence[Any], share: bool) -> Iterator[Any]:
    """Where a step's rows lie, layer by layer, for one new row of each request."""
    cache = engine.cache
    spans = torch.tensor([[r.sequence.slot, i, i + 1] for i, r in enumerate(requests)], dtype=torch.int32)
    for layer in range(cache.shape.num_layers):
        rows = cache._rows  # type: ignore[attr-defined]  # of the full cache
        yield replace(
            rows, spans=spans, share=share, page_add=layer * cache.shape.num_kv_heads, window=0, mask=None
        )


def _read_together(engine: Engine, texts: UnderWay, batch: int | None = None) -> int:
    """Bytes of cache that a step of the first `batch` texts reads when what is shared is read once."""
    kernels = engine.cache.shape.kernels
    if not isinstance(kernels, Library):
        return sum(engine.cache.read_per_step(r.sequence) for r in texts.requests[:batch] if r.sequence)
    call = next(_layers(engine, texts.requests[:batch], True))
    return kernels.shared(call)[1] * engine.cache.shape.token_bytes


if __name__ == "__main__":
    main()
