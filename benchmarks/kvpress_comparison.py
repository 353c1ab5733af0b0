"""trimtab's cache policies beside those of NVIDIA's kvpress: quality at equal bytes, and speed.

kvpress pins an older transformers, so it runs in an environment of its own (`--python`, see README.md) behind
a pipe. Both get the shipped checkpoint in one type, the same token ids and the same number of threads.

Equal bytes: kvpress removes a share of the prompt's rows from every head. trimtab's budget is set so that
what it holds at the end, whole pages and bookkeeping included, is no more than that, for the shortest prompt
of a cell of the grid. The bytes in the table are measured on both sides (tensors of the cache there, the
allocator's count here). kvpress's AdaKV frees nothing: it gets the same nominal share and its real bytes
stand beside ours.

Tasks, greedy and without a judge: a needle in prose and a key looked up in JSON records, once with the
question at the prompt's end, where a policy sees it before it compresses (`seen`), and once with the prompt
compressed before the question arrives (`hidden`, kvpress's own protocol); and the perplexity of tokens scored
one at a time behind a compressed context. A claim of equal quality allows for two standard errors of the
paired differences. Speed is one prompt and its tokens, in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
    ratio_text,
)
from _contenders import greedy

import trimtab
from trimtab import Engine, Model, SamplingParams
from trimtab.errors import TrimtabError
from trimtab.evaluation.chat import question_ids, split_question_ids
from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.statistics import mean, standard_error
from trimtab.evaluation.tasks.needle import NeedleOptions, make_cases
from trimtab.evaluation.tasks.perplexity import PerplexityOptions, cut_windows
from trimtab.evaluation.tasks.speed import make_prompts
from trimtab.models.tokenizer import Tokenizer
from trimtab.sizes import format_bytes
from trimtab.skills import vocabulary as words
from trimtab.skills.records import FIELDS, record

PAGE = 16
WORKER = Path(__file__).with_name("_kvpress_worker.py")
WINDOW = 32  # of SnapKV, on both sides


@dataclass(frozen=True)
class Pair:
    """A press of kvpress and our policy of the same idea; `policy` has a place for its number of rows.

    `rows(kept, generated, row_bytes)`: the budget that holds, in pages, no more than `kept` rows of the
    prompt and those generated do there, for every number of them in the range `generated`.
    """

    press: str | None
    policy: str
    rows: Callable[[int, range, int], int] = lambda kept, generated, row_bytes: 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def evicts(self) -> bool:
        return "{rows}" in self.policy


def _of_the_prompt(kept: int, generated: range, row_bytes: int) -> int:
    """A budget of the prompt, to which all generated rows come."""
    return max(WINDOW + 1, min((kept + g) // PAGE * PAGE - g for g in generated))


def _in_all(kept: int, generated: range, row_bytes: int) -> int:
    """A budget for good, with a score and a position of 4 bytes each beside every row of a page."""
    return max(2, kept * row_bytes // (row_bytes + 8) // PAGE * PAGE)


def _window(kept: int, generated: range, row_bytes: int) -> int:
    """A window beside a page of sinks that never takes more than a page beyond itself."""
    return max(1, (kept // PAGE - 2) * PAGE + 1)


PAIRS = [
    Pair(None, "full"),
    Pair("SnapKV", f"snapkv:budget={{rows}},window={WINDOW}", _of_the_prompt),
    Pair("StreamingLLM", "streaming:sinks=4,window={rows}", _window),
    Pair("ObservedAttention", "h2o:budget={rows}", _in_all),
    Pair("ExpectedAttention", "expected_attention:budget={rows}", _of_the_prompt),
    Pair("AdaKV(SnapKV)", "adakv:budget={rows},scorer=snapkv", _of_the_prompt),
    Pair("AdaKV(ExpectedAttention)", "adakv:budget={rows},scorer=expected_attention", _of_the_prompt),
    *(
        Pair(
            "QuantizedCache",
            f"kivi:bits={bits},group_size=64,residual=128",
            options={"nbits": bits, "q_group_size": 64, "residual_length": 128},
        )
        for bits in (4, 2)
    ),
]


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--python", help="the interpreter of an environment that has kvpress")
    parser.add_argument("--dtype", default="float32", help="of both sides")
    parser.add_argument(
        "--removed", nargs="*", type=int, default=[50, 75], help="percent of the prompt's rows"
    )
    parser.add_argument("--lengths", nargs="*", type=positive, default=[512, 1024, 1900], help="of prompts")
    parser.add_argument("--samples", type=positive, default=4, help="needles at each of five depths")
    parser.add_argument("--records", nargs="*", type=positive, default=[10, 20], help="in a prompt of lookup")
    parser.add_argument("--lookups", type=positive, default=20, help="prompts of lookup for each")
    parser.add_argument("--windows", type=positive, default=16, help="texts for the perplexity")
    parser.add_argument("--context", type=positive, default=1024, help="tokens of them before those scored")
    parser.add_argument("--scored", type=positive, default=64)
    parser.add_argument("--speed-prompt", type=positive, default=1900)
    parser.add_argument("--speed-tokens", type=positive, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = begin(parser)
    bench = Comparison(options)
    if options.python:
        with Worker(options, bench.model) as worker:
            bench.run(worker)
    bench.finish()


class Worker:
    """kvpress in its own environment."""

    def __init__(self, options: argparse.Namespace, model: Model) -> None:
        command = [options.python, str(WORKER), str(model.path), options.dtype, str(options.threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.versions = self._answer()["versions"]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"kvpress did not start: {self._process.stderr.read()[-2000:]}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


@dataclass(frozen=True)
class Question:
    """A question about a text: as one prompt, and cut into what is compressed first and what comes then."""

    whole: list[int]
    context: list[int]
    question: list[int]
    answer: str
    answer_ids: list[int]


@dataclass
class Side:
    """What one library did: right answers by task, losses by window, bytes after each."""

    right: dict[str, list[bool]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def shares(self) -> list[float]:
        return [float(x) for answers in self.right.values() for x in answers]


class Comparison:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = trimtab.load(dtype=options.dtype)
        assert self.model.tokenizer is not None
        self.tokenizer: Tokenizer = self.model.tokenizer
        self.questions = {"needle": self._needles(), "lookup": self._lookups()}
        wanted = PerplexityOptions(context=options.context, stride=options.scored, windows=options.windows)
        self.windows = cut_windows(self.tokenizer, shipped_text(), wanted)
        self.answer_tokens = 12
        self.table = Table(
            f"The shipped model, {options.dtype}; in each cell kvpress / trimtab",
            [
                *("removed", "kvpress", "trimtab", "KV bytes", "needle seen", "hidden"),
                *("lookup seen", "hidden", "perplexity", "TTFT ms", "ms / token", "trimtab is faster"),
            ],
        )
        self.records: list[dict[str, Any]] = []
        self.versions: dict[str, Any] | None = None

    # --- prompts: lists of questions of about equal length

    def _needles(self) -> list[list[Question]]:
        o = self.options
        cells = []
        for length in o.lengths:
            wanted = NeedleOptions(lengths=(length,), samples=o.samples, distractors=1)
            cases = make_cases(self.tokenizer, shipped_text(), wanted, o.seed)
            cells.append([self._question(c.prose, c.question, c.answer) for c in cases])
        return cells

    def _lookups(self) -> list[list[Question]]:
        return [
            [self._lookup(count, random.Random(f"{self.options.seed} {count} {i}")) for i in range(n)]
            for count, n in ((c, self.options.lookups) for c in self.options.records)
        ]

    def _lookup(self, count: int, rng: random.Random) -> Question:
        records = [record(rng, name) for name in words.full_names(rng, count)]
        asked, what = rng.choice(records), rng.choice(FIELDS)
        lines = "\n".join(json.dumps(r) for r in records)
        return self._question(lines, f"\nWhat is the {what} of {asked['name']}?", str(asked[what]))

    def _question(self, context: str, question: str, answer: str) -> Question:
        head, tail = split_question_ids(self.tokenizer, context, question)
        ids = self.tokenizer.encode(answer, add_special_tokens=False)
        return Question(question_ids(self.tokenizer, context + question), head, tail, answer, ids)

    # --- the two sides

    def run(self, worker: Worker) -> None:
        self.versions = worker.versions
        for pair in PAIRS:
            for removed in self.options.removed if pair.evicts else [0]:
                self._pair(worker, pair, removed)

    def _pair(self, worker: Worker, pair: Pair, removed: int) -> None:
        shown = pair.policy.replace("{rows}", "N")
        progress(f"{pair.press or 'no press'} and {shown}, {removed}% removed")
        ours, theirs = Side(), Side()
        share = f"{removed}%" if pair.evicts else "-"
        try:
            self._quality(worker, pair, removed, ours, theirs)
            speed = self._speed(worker, pair, removed)
        except (TrimtabError, RuntimeError) as error:
            why = " ".join(str(error).split())
            progress(f"  left out: {why}")
            self.records.append({"press": pair.press, "policy": shown, "removed": removed, "why": why})
            self.table.add(share, pair.press or "no press", shown, f"left out: {why}", *["-"] * 8)
            return
        difference = [a - b for a, b in zip(ours.shares(), theirs.shares(), strict=True)]
        paired = [a - b for a, b in zip(ours.losses, theirs.losses, strict=True)]
        found = {
            "press": pair.press,
            "policy": shown,
            "removed": removed,
            "why": None,
            "bytes": [mean(s.held) for s in (theirs, ours)],
            "bytes_ratio": max(a / b for a, b in zip(ours.held, theirs.held, strict=True)),
            "right": {
                task: [mean([float(x) for x in s.right[task]]) for s in (theirs, ours)] for task in ours.right
            },
            "right_difference": [mean(difference), standard_error(difference)],
            "perplexity": [math.exp(mean(s.losses)) for s in (theirs, ours)],
            "loss_difference": [mean(paired), standard_error(paired)],
            **speed,
        }
        self.records.append(found)
        both = [" / ".join(f"{x:.0%}" for x in pair_of) for pair_of in found["right"].values()]
        self.table.add(
            share,
            pair.press or "no press",
            shown,
            " / ".join(format_bytes(round(x)) for x in found["bytes"]),
            *both,
            " / ".join(f"{x:.2f}" for x in found["perplexity"]),
            " / ".join(f"{1e3 * x:.0f}" for x in found["ttft_s"]),
            " / ".join(f"{1e3 * x:.2f}" for x in found["token_s"]),
            ratio_text(found["faster"]),
        )

    def _press(self, pair: Pair, removed: int) -> dict[str, Any]:
        return {"press": pair.press, "ratio": removed / 100, "options": dict(pair.options)}

    def _engine(self, pair: Pair, removed: int, prompts: Sequence[Sequence[int]], generated: range) -> Engine:
        """Ours, holding no more than kvpress keeps of the shortest prompt and of `generated` rows."""
        kept = int(min(map(len, prompts)) * (1 - removed / 100))
        row_bytes = 2 * self.model.config.head_dim * self.model.dtype.itemsize
        policy = pair.policy.replace("{rows}", str(pair.rows(kept, generated, row_bytes)))
        return Engine(
            self.model,
            cache=policy,
            threads=self.options.threads,
            max_batch=8,
            kv_memory="512MiB",
            prefix_caching=False,
        )

    def _quality(self, worker: Worker, pair: Pair, removed: int, ours: Side, theirs: Side) -> None:
        press = self._press(pair, removed)
        for task, cells in self.questions.items():
            for cell in cells:
                engine = self._engine(pair, removed, [q.whole for q in cell], range(self.answer_tokens))
                ours.right.setdefault(f"{task} seen", []).extend(self._ours_seen(engine, cell, ours))
                for q in cell:
                    answer = worker.ask(ids=q.whole, question=[], tokens=self.answer_tokens, **press)
                    text = self.tokenizer.decode(answer["tokens"]).strip()
                    theirs.right.setdefault(f"{task} seen", []).append(text == q.answer)
                    theirs.held.append(answer["bytes"])
            for cell in cells:
                # The last token is never fed.
                generated = [len(q.question + q.answer_ids) - 1 for q in cell]
                engine = self._engine(
                    pair, removed, [q.context for q in cell], range(min(generated), max(generated) + 1)
                )
                scored = engine.score([(q.context, q.question + q.answer_ids) for q in cell])
                for q, score in zip(cell, scored, strict=True):
                    right = all(score.greedy[-len(q.answer_ids) :])
                    ours.right.setdefault(f"{task} hidden", []).append(right)
                    ours.held.append(score.metrics.kv_bytes_held)
                    answer = worker.ask(ids=q.context, question=q.question, tokens=len(q.answer_ids), **press)
                    theirs.right.setdefault(f"{task} hidden", []).append(answer["tokens"] == q.answer_ids)
                    theirs.held.append(answer["bytes"])
        n = max(len(w.scored) for w in self.windows)
        engine = self._engine(pair, removed, [w.context for w in self.windows], range(n))
        scored = engine.score([(w.context, w.scored) for w in self.windows])
        for window, score in zip(self.windows, scored, strict=True):
            ours.losses.append(-math.fsum(score.logprobs) / len(window.scored))
            ours.held.append(score.metrics.kv_bytes_held)
            answer = worker.ask(ids=window.context, score=window.scored, **press)
            theirs.losses.append(-math.fsum(answer["logprobs"]) / len(window.scored))
            theirs.held.append(answer["bytes"])

    def _ours_seen(self, engine: Engine, cell: list[Question], side: Side) -> list[bool]:
        params = SamplingParams(max_tokens=self.answer_tokens, temperature=0.0)
        outs = engine.generate([q.whole for q in cell], params)
        side.held += [out.metrics.kv_bytes_held for out in outs]
        return [out.text.strip() == q.answer for out, q in zip(outs, cell, strict=True)]

    def _speed(self, worker: Worker, pair: Pair, removed: int) -> dict[str, Any]:
        """One prompt and its tokens, in turns; times as (kvpress, trimtab)."""
        o = self.options
        rng = random.Random(o.seed)
        [prompt] = make_prompts(self.tokenizer, shipped_text(), rng, 1, o.speed_prompt)
        engine = self._engine(pair, removed, [prompt], range(o.speed_tokens))
        press = self._press(pair, removed)
        first: dict[str, list[float]] = {"kvpress": [], "trimtab": []}

        def ours() -> Sample:
            start = time.perf_counter()
            [out] = engine.generate([prompt], greedy(o.speed_tokens))
            times = out.metrics.token_times
            first["trimtab"].append(times[0])
            token_s = (times[-1] - times[0]) / (len(times) - 1)
            return Sample(o.speed_tokens, time.perf_counter() - start, token_s)

        def theirs() -> Sample:
            answer = worker.ask(ids=prompt, question=[], tokens=o.speed_tokens, ignore_end=True, **press)
            first["kvpress"].append(answer["ttft_s"])
            seconds = answer["ttft_s"] + answer["token_s"] * (o.speed_tokens - 1)
            return Sample(o.speed_tokens, seconds, answer["token_s"])

        samples = alternate({"kvpress": theirs, "trimtab": ours}, o.rounds)
        each = [
            (a.token_s or 0) / (b.token_s or 1)
            for a, b in zip(samples["kvpress"], samples["trimtab"], strict=True)
        ]
        return {
            # The first of them warmed up.
            "ttft_s": [statistics.median(first[name][1:]) for name in ("kvpress", "trimtab")],
            "token_s": [
                statistics.median(s.token_s or 0 for s in samples[name]) for name in ("kvpress", "trimtab")
            ],
            "faster": {"median": statistics.median(each), "min": min(each), "max": max(each)},
        }

    # --- claims

    def claims(self) -> list[Claim]:
        if not self.options.python:
            return [
                Claim("quality and speed beside kvpress", None, 1.0, why="kvpress is not here (--python)")
            ]
        found = []
        for r in self.records:
            name = f"{r['removed']}% removed, {r['policy']} beside {r['press']}"
            if r["press"] is None:
                continue
            if r["why"] is not None:
                found.append(Claim(f"{name}, share right", None, 0.0, why=r["why"]))
                continue
            change, error = r["right_difference"]
            found.append(Claim(f"{name}, share right, ours less theirs", change, _least(error)))
            change, error = r["loss_difference"]
            found.append(Claim(f"{name}, loss, theirs less ours, nat", -change, _least(error)))
            if r["removed"]:  # KIVI keeps its residual in full, which transformers' cache does not
                found.append(Claim(f"{name}, bytes of theirs at most", r["bytes_ratio"], 1.0, at_most=True))
            found.append(Claim(f"{name}, times their speed a token", r["faster"]["median"], 1.0))
        return found

    def finish(self) -> None:
        record = {"results": self.records, "kvpress_versions": self.versions}
        if self.versions:
            names = ", ".join(f"{k} {v}" for k, v in self.versions.items() if v)
            self.table.title += f"; {names}"
        finish("kvpress_comparison", [self.table], self.claims(), record, self.options, self.options.seed)


def _least(error: float | None) -> float:
    """Equal, as far as these samples can tell."""
    return -max(1e-3, 2 * (error or 0.0))


if __name__ == "__main__":
    main()
