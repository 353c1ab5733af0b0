"""What every KV-cache policy holds, moves, costs in quality and takes in time, in one table.

A row is a policy at one length of text and one number of texts at once. `held` is the allocator's count of
bytes for a text of that length: codes, scales, codebooks, residual windows, bookkeeping, the unused ends of
pages; of a policy that keeps something in host memory, what is on the device. `analytic` is what the
policy's definition says it should be, worked out apart (`_analytic.py`). `bits` are held bytes for each
number that a full cache would keep of the text. `moved` are bytes copied between places (packing,
compaction, host and device) for a generated token; the JSON has the prompt's too.

Perplexity and needle are those of `trimtab compare`: contexts of almost the given length, then tokens scored
one at a time, and a sentence hidden in prose and asked for at the prompt's end. All policies get equal
texts. At more than 2048 tokens the shipped model is stretched by YaRN without any training: read the
quality there as differences to `full`. A second table has the quality on the same model with outlier
channels in its keys (a few channels 20 times as large, and the queries' as much smaller).

For the speeds all policies hold their texts at once in one process and take turns decoding, so that a
round's ratio to `full` is taken at nearly the same moment and at equal lengths. A policy that does not exist
here, or refuses the model, leaves a row that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _models
from _analytic import Text, analytic_bytes
from _common import (
    Claim,
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
from _under_way import UnderWay

from trimtab import Engine, Model
from trimtab.errors import TrimtabError
from trimtab.evaluation.corpus import load_text
from trimtab.evaluation.memory import kv_numbers_per_token
from trimtab.evaluation.tasks.base import TaskContext, TaskResult
from trimtab.evaluation.tasks.needle import ANSWER_TOKENS, Needle, NeedleOptions
from trimtab.evaluation.tasks.perplexity import MAX_CHARACTER_TOKENS, Perplexity, PerplexityOptions
from trimtab.evaluation.tasks.speed import make_prompts
from trimtab.models.costs import kv_bytes_per_token
from trimtab.sizes import format_bytes

# At equal group sizes, so that they hold nearly equal bytes: 128 channels are the whole layer of this model.
NEAREST, ROTATED = "rtn:bits=2,group_size=64", "rotatekv:bits=2,group_size=64"
QUANTIZED = ["kivi:bits=4", "kivi:bits=3", "kivi:bits=2", "rtn:bits=4", "rtn:bits=2", NEAREST]
CALIBRATED = ["kvquant:bits=3", "rotatekv:bits=2", ROTATED]
EVICTING = ["h2o:budget=25%", "snapkv:budget=25%", "expected_attention:budget=25%", "adakv:budget=25%"]
OTHERS = ["retrieval_heads", "streaming", "kcache", "sentencekv"]
COMBINED = ["snapkv:budget=25%+kivi:bits=4", "kivi:bits=4+kcache"]
POLICIES = [*QUANTIZED, *CALIBRATED, *EVICTING, *OTHERS, *COMBINED]
STEP = 512  # tokens of a step at most
FITTED_SHARE = 0.6  # of the text, for what policies fit (they want 16 x 2048 tokens); the rest measures


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--policies", nargs="*", default=POLICIES, help="besides `full`, always taken")
    parser.add_argument("--contexts", nargs="*", type=positive, default=[2048, 8192])
    parser.add_argument("--batches", nargs="*", type=positive, default=[1, 8], help="texts at once")
    parser.add_argument("--tokens", type=positive, default=32, help="decoded by each text in a round")
    parser.add_argument("--dtype", default="bfloat16", help="type of weights and of the full cache")
    parser.add_argument("--text", default="shipped", help="`shipped`, or a UTF-8 text file")
    parser.add_argument("--windows", type=positive, default=8, help="texts for the perplexity")
    parser.add_argument("--scored", type=positive, default=256, help="tokens scored in each of them")
    parser.add_argument("--samples", type=positive, default=4, help="needles at each of five depths")
    parser.add_argument("--no-outliers", action="store_true", help="not the model with outlier channels")
    parser.add_argument("--seed", type=int, default=0)
    options = begin(parser)
    for context in options.contexts:
        if context < 4 * options.scored or context < 2 * (options.rounds + 1) * options.tokens:
            parser.error(f"--contexts {context} is too short for --scored, --rounds and --tokens")

    bench = KVCacheBenchmark(options)
    for context in options.contexts:
        bench.quality(context, outliers=False)
        for batch in options.batches:
            bench.speed(context, batch)
    if not options.no_outliers:
        bench.quality(min(options.contexts), outliers=True)
    bench.finish()


@dataclass
class Row:
    """What was found out about a policy at one length; `why`: the reason for there being nothing."""

    why: str | None = None
    perplexity: TaskResult | None = None
    needle: TaskResult | None = None
    speeds: dict[int, dict[str, Any]] = field(default_factory=dict)


class KVCacheBenchmark:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.policies = list(dict.fromkeys(["full", *options.policies]))
        self.rows: dict[tuple[int, bool], dict[str, Row]] = {}
        self.fitted, self.measured = self._texts()

    def _texts(self) -> tuple[Path, Path]:
        """Two files: text to fit on, and text to measure on."""
        text = load_text(self.options.text)
        cut = text.index("\n", int(len(text) * FITTED_SHARE))
        folder = _models.folder().parent
        for name, part in (("fitted", text[:cut]), ("measured", text[cut:])):
            (folder / f"{name}.txt").write_text(part, encoding="utf-8")
        return folder / "fitted.txt", folder / "measured.txt"

    def _row(self, context: int, outliers: bool, policy: str) -> Row:
        return self.rows.setdefault((context, outliers), {}).setdefault(policy, Row())

    def _engine(self, model: Model, policy: str, length: int, batch: int) -> Engine:
        """An engine with room for `batch` texts of `length`, prompts held in full until their end."""
        room = (length + 2 * STEP) * kv_bytes_per_token(model.config, model.dtype.itemsize)

        def make() -> Engine:
            return Engine(
                model,
                cache=policy,
                threads=self.options.threads,
                max_batch=batch,
                max_step_tokens=STEP,
                # More than any policy needs beside its rows: notes, queries of the prompt's end, codes.
                kv_memory=2 * batch * room,
                prefix_caching=False,
            )

        try:
            return make()
        except TrimtabError as error:
            kind, needs, _ = str(error).partition(" needs an attachment")
            if not needs or model.path is None:
                raise
            progress(f"fitting {kind} for {model.path.name}")
            failed = _models.attach(kind, model.path, self.fitted)
            if failed:
                raise type(error)(f"{error} (tried: {failed})") from None
            return make()

    # --- quality

    def quality(self, context: int, outliers: bool) -> None:
        o = self.options
        model = _models.variant(o.dtype, max(context, _models.TRAINED), outliers)
        kind = " with outlier channels" if outliers else ""
        perplexity = Perplexity(
            PerplexityOptions(
                text=str(self.measured),
                context=context - o.scored - 2 * MAX_CHARACTER_TOKENS,
                stride=o.scored,
                windows=o.windows,
            )
        )
        needle = Needle(
            NeedleOptions(
                lengths=(context - ANSWER_TOKENS,), samples=o.samples, distractors=1, text=str(self.measured)
            )
        )
        for policy in self.policies:
            progress(f"quality at {context}{kind}: {policy}")
            row = self._row(context, outliers, policy)
            with self._refusals(row):
                engine = self._engine(model, policy, context, min(8, o.windows))
                row.perplexity = perplexity.run(engine, TaskContext(o.seed))
                row.needle = needle.run(engine, TaskContext(o.seed))
            gc.collect()

    @contextlib.contextmanager
    def _refusals(self, row: Row) -> Iterator[None]:
        try:
            yield
        except TrimtabError as error:
            row.why = " ".join(str(error).split())
            progress(f"  left out: {row.why}")

    # --- bytes and speed

    def speed(self, context: int, batch: int) -> None:
        """Every policy decodes the same `batch` texts, in turns, up to `context` tokens."""
        o = self.options
        model = _models.variant(o.dtype, max(context, _models.TRAINED))
        assert model.tokenizer is not None
        # The warm-up's tokens, the rounds', the first one, one to spare so that no text ends, and those that
        # a text is given while the prompts of the texts behind it are computed.
        decoded = (o.rounds + 1) * o.tokens + 2 + (batch - 1) * (context // STEP + 2)
        rng = random.Random(o.seed)
        text = self.measured.read_text(encoding="utf-8")
        prompts = make_prompts(model.tokenizer, text, rng, batch, context - decoded)
        texts: dict[str, UnderWay] = {}
        for policy in self.policies:
            row = self._row(context, False, policy)
            if row.why is None:
                progress(f"prompts of {len(prompts[0])} tokens x {batch}: {policy}")
                with self._refusals(row):
                    engine = self._engine(model, policy, context, batch)
                    texts[policy] = UnderWay(engine, prompts, warm_up=prompts[0][:64])
        turns = {name: (lambda t=t: t.decode(o.tokens)) for name, t in texts.items()}
        samples = alternate(turns, o.rounds)
        for policy, t in texts.items():
            taken = samples[policy]
            self._row(context, False, policy).speeds[batch] = bytes_of(t) | {
                "ttft_s": t.ttft_s,
                "tokens_s": rate(taken),
                "token_ms": 1e3 * batch / rate(taken),
                "rounds": [s.rate for s in taken],
                "of_full": ratio(taken, samples["full"]),
            }
            t.close()

    # --- tables

    def table(self) -> Table:
        table = Table(
            f"The shipped model, {self.options.dtype}; beyond {_models.TRAINED} tokens stretched "
            f"({_models.STRETCH}): compare quality there with full's",
            [
                *("text x batch", "policy", "bits", "held", "analytic", "held / analytic", "moved / token"),
                *("perplexity", "needle", "TTFT ms", "ms / token", "speed of full"),
            ],
        )
        for (context, outliers), rows in self.rows.items():
            if outliers:
                continue
            for batch in self.options.batches:
                for policy, row in rows.items():
                    self._add(table, f"{context} x {batch}", policy, row, batch, rows["full"])
        return table

    @staticmethod
    def _add(table: Table, where: str, policy: str, row: Row, batch: int, full: Row) -> None:
        found = row.speeds.get(batch)
        if found is None:
            table.add(where, policy, "left out", *["-"] * 9)
            return
        exact = found["analytic"]
        table.add(
            where,
            policy,
            f"{found['bits']:.2f}",
            format_bytes(found["held"]),
            "-" if exact is None else format_bytes(round(exact)),
            "-" if exact is None else f"{found['held'] / exact:.3f}",
            format_bytes(round(found["moved_per_token"])),
            *_quality(row, full),
            f"{found['ttft_s'] * 1e3:.0f}",
            f"{found['token_ms']:.2f}",
            ratio_text(found["of_full"]),
        )

    def outlier_table(self) -> list[Table]:
        tables = []
        for (context, outliers), rows in self.rows.items():
            if not outliers:
                continue
            table = Table(
                f"The same model with outlier channels in its keys, texts of {context} tokens",
                ["policy", "perplexity", "needle"],
            )
            for policy, row in rows.items():
                table.add(policy, *_quality(row, rows["full"]))
            tables.append(table)
        return tables

    def left_out(self) -> list[Table]:
        reasons = {p: row.why for rows in self.rows.values() for p, row in rows.items() if row.why}
        table = Table("Left out", ["policy", "why"], [*reasons.items()])
        return [table] if reasons else []

    # --- claims

    def claims(self) -> list[Claim]:
        found: list[Claim] = []
        for (context, outliers), rows in self.rows.items():
            where = f"{context} tokens" + (", outlier channels" if outliers else "")
            for policy, percent in (("kivi:bits=4", 0.5), ("kivi:bits=2", 3.0), ("kvquant:bits=3", 3.0)):
                if policy in rows:
                    value = _percent(rows[policy], rows["full"])
                    why = rows[policy].why or "nothing to compare"
                    found.append(
                        Claim(f"{where}: {policy}, % more perplexity", value, percent, at_most=True, why=why)
                    )
            if {ROTATED, NEAREST} <= set(rows):
                ours, theirs = rows[ROTATED], rows[NEAREST]
                value = None
                if ours.perplexity and theirs.perplexity:
                    value = _value(theirs.perplexity, "perplexity") / _value(ours.perplexity, "perplexity")
                why = ours.why or theirs.why or ""
                found.append(Claim(f"{where}: perplexity of {NEAREST} over rotatekv's", value, 1.05, why=why))
            if context >= 8192:
                found += self._speed_claims(where, rows)
        return found + self._bytes_claims()

    def _bytes_claims(self) -> list[Claim]:
        """For each policy the farthest that held bytes are from the analytic figure."""
        off: dict[str, float] = {}
        for rows in self.rows.values():
            for policy, row in rows.items():
                for speed in row.speeds.values():
                    if speed["analytic"]:
                        here = abs(speed["held"] / speed["analytic"] - 1) * 100
                        off[policy] = max(off.get(policy, 0.0), here)
        name = "held bytes off the analytic figure, % at most"
        return [Claim(f"{policy}, {name}", value, 2.0, at_most=True) for policy, value in off.items()]

    @staticmethod
    def _speed_claims(where: str, rows: dict[str, Row]) -> list[Claim]:
        found = []
        for policy, row in rows.items():
            target = 0.8 if policy in QUANTIZED + CALIBRATED else 1.5 if policy in EVICTING else None
            if target is not None:
                for batch, speed in row.speeds.items():
                    name = f"{where} x {batch}: {policy}, speed of full"
                    found.append(Claim(name, speed["of_full"]["median"], target))
        return found

    def finish(self) -> None:
        results = [
            {
                "context": context,
                "outliers": outliers,
                "policies": {
                    policy: {
                        "why": row.why,
                        "perplexity": _record(row.perplexity),
                        "needle": _record(row.needle),
                        "speeds": row.speeds,
                    }
                    for policy, row in rows.items()
                },
            }
            for (context, outliers), rows in self.rows.items()
        ]
        tables = [self.table(), *self.outlier_table(), *self.left_out()]
        record = {"results": results, "stretch": _models.STRETCH}
        contexts = self.options.contexts
        name = "kvcache" if len(contexts) > 1 else f"kvcache-{contexts[0]}"
        finish(name, tables, self.claims(), record, self.options, self.options.seed)


def bytes_of(texts: UnderWay) -> dict[str, Any]:
    """What a text holds now, and what it should."""
    engine, config = texts.engine, texts.engine.model.config
    held = exact = numbers = 0.0
    known = True
    for request in texts.requests:
        assert request.sequence is not None
        length = request.sequence.length
        kept = _kept(engine, request.sequence.slot)
        text = Text(request.prompt_length, length, config, engine.model.dtype.itemsize, kept)
        one = analytic_bytes(engine.plan.cache, text)
        known &= one is not None
        exact += one or 0
        held += engine.cache.held_by(request.sequence)
        numbers += length * kv_numbers_per_token(config)
    stats, count = engine.stats(), len(texts.requests)
    return {
        "held": round(held / count),
        "held_by_all": stats.kv_bytes_held,
        "analytic": exact / count if known else None,
        "bits": 8 * held / numbers,
        "moved_per_token": stats.kv_bytes_moved / stats.tokens,
        "moved_per_prompt": texts.prompt_moved / count,
        "read_per_step": texts.read_per_step,
        "tokens": numbers / count / kv_numbers_per_token(config),
    }


def _kept(engine: Engine, slot: int) -> int:
    """How many tokens are kept in full because of what they are, which no formula foretells."""
    tables = getattr(getattr(engine.cache, "rows", None), "tables", None)
    count = getattr(tables, "kept_count", None)
    return 0 if count is None else int(count[slot].sum())


def _value(result: TaskResult, name: str) -> float:
    value = result.metrics[name].value
    assert value is not None
    return value


def _percent(row: Row, full: Row) -> float | None:
    if row.perplexity is None or full.perplexity is None:
        return None
    return 100 * (_value(row.perplexity, "perplexity") / _value(full.perplexity, "perplexity") - 1)


def _quality(row: Row, full: Row) -> tuple[str, str]:
    """Perplexity with its change, and the share of needles found."""
    if row.why is not None:
        return "left out", "-"
    percent = _percent(row, full)
    if row.perplexity is None or row.needle is None or percent is None:
        return "-", "-"
    text = f"{_value(row.perplexity, 'perplexity'):.2f}"
    change = "" if row is full else f" ({percent:+.2f}%)"
    return text + change, f"{_value(row.needle, 'accuracy'):.0%}"


def _record(result: TaskResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    values = {name: [m.value, m.stderr] for name, m in result.metrics.items()}
    return {"metrics": values, "detail": dict(result.detail)}


if __name__ == "__main__":
    main()
