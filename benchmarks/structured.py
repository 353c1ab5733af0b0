"""Structured outputs: how exact the masks are, what they cost, and how much speed is left with them.

Exactness and cost come from a sample of jsonschemabench (schemas with valid and invalid instances): on which
rung of the ladder each schema stands, which instances are accepted or rejected wrongly (the compact dump,
tokenised by the shipped tokenizer, token by token through the mask and then through the check), compile and
mask times, and how many tokens are forced. llguidance fixes the order of keys, so an instance counts as
rejected wrongly only if no order of its keys is accepted; rejections in the file's own order are also told.

Speed is that of the engine with the constraint over without: the same prompts, the same number of tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
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
from _key_order import in_allowed_order

import trimtab
from trimtab import Engine, Model, SamplingParams
from trimtab.decoding.constraints.base import StructuredOutputs
from trimtab.decoding.constraints.compiler import Compiler
from trimtab.errors import RequestError

SAMPLE = Path(__file__).parents[1] / "../shared/data/jsonschemabench/sample.jsonl.gz"
RUNGS = ("exact", "relaxed", "generic", "refused")
# An array without end: a text can be as long as is asked for.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["cat", "dog", "bird", "fish"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        },
        "required": ["name", "kind", "age", "tags"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="sample.jsonl.gz of jsonschemabench")
    parser.add_argument("--schemas", type=positive, help="look at the first so many only")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--tokens", type=positive, default=200, help="tokens each text gets, for the speeds")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-speed", action="store_true", help="leave the engine's speeds out")
    options = begin(parser)
    model = trimtab.load(dtype=options.dtype)
    bench = Structured(model, options)
    bench.exactness()
    if not options.no_speed:
        bench.speed()
    options.data = options.data.name
    finish("structured", bench.tables, bench.claims, bench.record, options)


class Structured:
    def __init__(self, model: Model, options: argparse.Namespace) -> None:
        assert model.tokenizer is not None
        self.model = model
        self.tokenizer = model.tokenizer
        self.options = options
        self.tables: list[Table] = []
        self.claims: list[Claim] = []
        self.record: dict[str, Any] = {}

    def exactness(self) -> None:
        """Rungs, wrong answers and costs over the sample."""
        path = self.options.data
        if not path.exists():
            progress(f"{path} is not here: exactness is left out")
            for name in ("false accepts", "false rejects"):
                self.claims.append(Claim(name, None, 0, at_most=True, why="no jsonschemabench"))
            return
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][: self.options.schemas]
        compiler = Compiler(
            self.tokenizer, self.model.config.vocab_size, self.tokenizer.eos_ids, cache_size=1
        )
        found = Exactness(self.tokenizer, compiler)
        for index, row in enumerate(rows):
            found.add(row)
            if index % 100 == 99:
                progress(f"{index + 1} of {len(rows)} schemas")
        self.tables += found.tables()
        self.record["exactness"] = found.record()
        self.claims.append(Claim("false accepts", len(found.false_accepts), 0, at_most=True))
        self.claims.append(Claim("false rejects", len(found.false_rejects), 0, at_most=True))

    def speed(self) -> None:
        """Tokens per second with a constraint over without, for greedy and drawn texts."""
        if "structured_outputs" not in {field.name for field in dataclasses.fields(SamplingParams)}:
            progress("this engine takes no structured_outputs yet: speeds are left out")
            return
        table = Table(
            f"batch of {self.options.batch}, {self.options.tokens} tokens a text",
            ["texts", "free tokens/s", "constrained tokens/s", "constrained over free"],
        )
        self.record["speed"] = {}
        engine = Engine(
            self.model, threads=self.options.threads, max_batch=self.options.batch, prefix_caching=False
        )
        prompts = [f"Write some animals as JSON, list {i}:\n" for i in range(self.options.batch)]
        for name, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
            free = SamplingParams(
                max_tokens=self.options.tokens, temperature=temperature, ignore_eos=True, seed=1
            )
            # The schema cannot be met within so few tokens, hence neither text ends early.
            bound = dataclasses.replace(
                free, ignore_eos=False, structured_outputs=StructuredOutputs(json=SCHEMA)
            )
            samples = alternate(
                {
                    "free": lambda p=free: self._run(engine, prompts, p),
                    "constrained": lambda p=bound: self._run(engine, prompts, p),
                },
                self.options.rounds,
            )
            share = ratio(samples["constrained"], samples["free"])
            table.add(
                name, f"{rate(samples['free']):.0f}", f"{rate(samples['constrained']):.0f}", ratio_text(share)
            )
            self.record["speed"][name] = {
                "free_tokens_s": [s.rate for s in samples["free"]],
                "constrained_tokens_s": [s.rate for s in samples["constrained"]],
                "ratio": share,
            }
            self.claims.append(Claim(f"{name}: constrained over free", share["median"], 0.9))
        self.tables.append(table)

    def _run(self, engine: Engine, prompts: list[str], params: SamplingParams) -> Sample:
        start = time.perf_counter()
        outputs = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        assert tokens == len(prompts) * self.options.tokens, "both must make the same number of tokens"
        return Sample(tokens, seconds)


class Exactness:
    """What the masks and checks said of the sample's instances."""

    def __init__(self, tokenizer: Any, compiler: Compiler) -> None:
        self.tokenizer = tokenizer
        self.compiler = compiler
        self.rungs: Counter[str] = Counter()
        self.keywords: dict[str, Counter[str]] = {rung: Counter() for rung in RUNGS}
        self.instances: Counter[str] = Counter()
        self.false_accepts: list[str] = []
        self.false_rejects: list[str] = []
        self.file_order_rejects: list[str] = []
        self.compile_s: list[float] = []
        self.mask_s: list[float] = []
        self.advance_s: list[float] = []
        self.tokens = 0
        self.forced = 0

    def add(self, row: dict[str, Any]) -> None:
        """One schema with its instances."""
        start = time.perf_counter()
        try:
            constraint: Any = self.compiler.compile(StructuredOutputs(json=row["schema"]), timeout_s=60)
        except RequestError as error:
            self.rungs["refused"] += 1
            self.keywords["refused"][str(error).split(" is ")[0][:80]] += 1
            return
        finally:
            self.compile_s.append(time.perf_counter() - start)
        self.rungs[constraint.rung] += 1
        if constraint.rung != "exact":
            self.keywords[constraint.rung][_reason(constraint.notes)] += 1
        for test in row["tests"]:
            accepted = self._accepted(constraint, json.dumps(test["data"], **COMPACT))
            self.instances["valid" if test["valid"] else "invalid"] += 1
            if accepted and not test["valid"]:
                self.false_accepts.append(row["id"])
            if not accepted and test["valid"]:
                self.file_order_rejects.append(row["id"])
                if not self._accepted_in_some_order(constraint, row["schema"], test["data"]):
                    self.false_rejects.append(row["id"])

    def _accepted(self, constraint: Any, text: str) -> bool:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        state = constraint.start()
        mask = np.zeros(-(-self.tokenizer.vocab_size // 32), np.int32)
        forced: list[int] = []
        for token in ids:
            start = time.perf_counter()
            state.fill_mask(mask)
            self.mask_s.append(time.perf_counter() - start)
            if not mask[token >> 5] >> (token & 31) & 1:
                return False
            forced = forced or state.forced_tokens()
            self.tokens += 1
            self.forced += forced[:1] == [token]
            forced = forced[1:] if forced[:1] == [token] else []
            start = time.perf_counter()
            assert state.advance(token)
            self.advance_s.append(time.perf_counter() - start)
        return state.accepting and constraint.check(text) is None

    def _accepted_in_some_order(self, constraint: Any, schema: Any, value: Any) -> bool:
        from trimtab.decoding.constraints.json_schema import compile_schema
        from trimtab.decoding.constraints.patterns import byte_tokenizer

        # Single bytes have one tokenisation only, so trying keys never meets canonical ones.
        matcher = compile_schema(schema, byte_tokenizer(), compact=True).matcher
        text = in_allowed_order(value, matcher, schema)
        return text is not None and self._accepted(constraint, text)

    def tables(self) -> list[Table]:
        rungs = Table("Schemas by rung", ["rung", "schemas", "share", "keywords not kept by the mask"])
        total = sum(self.rungs.values())
        for rung in RUNGS:
            counts = ", ".join(f"{name} {count}" for name, count in self.keywords[rung].most_common())
            rungs.add(rung, str(self.rungs[rung]), f"{self.rungs[rung] / total:.1%}", counts or "-")
        answers = Table("Instances", ["", "count"])
        answers.add("valid", str(self.instances["valid"]))
        answers.add("invalid", str(self.instances["invalid"]))
        answers.add("invalid but accepted", str(len(self.false_accepts)))
        answers.add("valid but rejected, in every order of keys", str(len(self.false_rejects)))
        answers.add("valid but rejected in the file's order of keys", str(len(self.file_order_rejects)))
        costs = Table("Costs", ["", "p50", "p99", "mean"])
        for name, unit, values in (
            ("compile, ms", 1e3, self.compile_s),
            ("mask, us", 1e6, self.mask_s),
            ("advance, us", 1e6, self.advance_s),
        ):
            p50, p99 = np.percentile(values, [50, 99]) * unit
            costs.add(name, f"{p50:.1f}", f"{p99:.1f}", f"{np.mean(values) * unit:.1f}")
        costs.add("forced tokens", "-", "-", f"{self.forced / max(self.tokens, 1):.1%}")
        return [rungs, answers, costs]

    def record(self) -> dict[str, Any]:
        return {
            "rungs": dict(self.rungs),
            "keywords": {rung: dict(counts) for rung, counts in self.keywords.items()},
            "instances": dict(self.instances),
            "false_accepts": self.false_accepts,
            "false_rejects": self.false_rejects,
            "file_order_rejects": self.file_order_rejects,
            "tokens": self.tokens,
            "forced_share": self.forced / max(self.tokens, 1),
            "compile_ms": _spread(self.compile_s, 1e3),
            "mask_us": _spread(self.mask_s, 1e6),
            "advance_us": _spread(self.advance_s, 1e6),
        }


COMPACT: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False}


def _spread(values: list[float], unit: float) -> dict[str, float]:
    p50, p99 = np.percentile(values, [50, 99]) * unit
    return {"p50": float(p50), "p99": float(p99), "mean": float(np.mean(values)) * unit}


def _reason(notes: tuple[str, ...]) -> str:
    """The keywords out of a constraint's last note."""
    note = notes[-1]
    if note.startswith("the mask does not keep "):
        return note.removeprefix("the mask does not keep ").split(";")[0]
    if "names a property twice" in note:
        return "minProperties (repeated names)"
    known = ("look-around", "regex is empty", "intersection", "circular")
    return next((name for name in known if name in note), note[-60:])


if __name__ == "__main__":
    main()
