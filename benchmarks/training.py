"""Tokens per second of a training run: trimtab's loop, transformers' Trainer and TRL's SFTTrainer.

The shipped model is trained on in float32 by AdamW on the CPU, on the same texts in the same order. `plain`
is language modelling on windows of equal length; `sft` is texts of varied length of which the second half is
learnt, where TRL pads or packs and trimtab does neither. Only tokens of texts count, in all rows. Contenders
take turns, each run beginning with the same weights, and the first step of a run is not timed. Then the
losses of a longer run are compared step by step, but not with TRL packing, whose steps hold other texts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    INSTALL,
    Claim,
    Sample,
    Table,
    alternate,
    arguments,
    begin,
    finish,
    missing,
    positive,
    progress,
    rate,
    ratio,
    ratio_text,
)
from _trainers import Job, Run, ours, transformers_trainer, trl_trainer

import trimtab
from trimtab.evaluation.corpus import shipped_text
from trimtab.training.data.files import find_files
from trimtab.training.data.readers import iterate_records
from trimtab.training.data.segments import Segment, all_trained

INSTALL |= {"trl": "pip install trl", "datasets": "pip install datasets"}
SHORTEST = 32  # tokens of a text to be fine-tuned on
TARGET = 1.3
NOISE = 0.01  # nats a token; losses of neighbouring steps differ by ten times that


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--windows", nargs="*", type=positive, default=[512, 1024])
    parser.add_argument("--sft-longest", type=positive, default=512, help="tokens of the longest `sft` text")
    parser.add_argument("--step-tokens", type=positive, default=8192, help="about the tokens of a step")
    parser.add_argument("--micro-tokens", type=positive, default=4096, help="through the model at a time")
    parser.add_argument("--steps", type=positive, default=4, help="steps of a timed run, the first not timed")
    parser.add_argument("--curve-steps", type=positive, default=20, help="steps whose losses are compared")
    parser.add_argument("--data", default=os.environ.get("BOOKS"), help="texts; default $BOOKS, else shipped")
    options = begin(parser)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step of a run is not timed")
    bench = Training(options)
    for window in options.windows:
        bench.one(f"plain {window}", bench.plain(window), packs=False)
    bench.one("sft", bench.varied(options.sft_longest), packs=True)
    bench.finish()


class Training:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.steps = max(options.steps, options.curve_steps)
        self.tokens = list(_tokens(options.data, 2 * self.steps * options.step_tokens))
        self.speeds = Table(
            f"Training the shipped model, float32, AdamW, {options.threads} threads",
            ["data", "trainer", "tokens/s", "trimtab is faster", "greatest loss difference"],
        )
        self.records: dict[str, Any] = {}

    def plain(self, window: int) -> Job:
        """Windows of `window` tokens, all of them learnt."""
        rows = max(1, self.options.micro_tokens // window)
        each = rows * max(1, self.options.step_tokens // self.options.micro_tokens)
        windows = (np.array(self.tokens[at : at + window]) for at in range(0, len(self.tokens), window))
        return _job([all_trained(tokens) for tokens in windows], self.steps, each, rows, window)

    def varied(self, longest: int) -> Job:
        """Texts of `SHORTEST` to `longest` tokens, as many of each octave, their second halves learnt."""
        rng = np.random.default_rng(0)
        rows = max(1, self.options.micro_tokens // longest)
        # A log-uniform length is (longest - shortest) / ln(longest / shortest) in the mean.
        mean = (longest - SHORTEST) / np.log(longest / SHORTEST)
        each = rows * max(1, round(self.options.step_tokens / mean / rows))
        made, at = [], 0
        for _ in range(self.steps * each):
            length = round(SHORTEST * (longest / SHORTEST) ** rng.random())
            tokens = np.array(self.tokens[at : at + length])
            made.append(Segment(tokens, np.arange(len(tokens)) >= len(tokens) // 2))
            at += length
        return _job(made, self.steps, each, rows, longest)

    def one(self, title: str, job: Job, packs: bool) -> None:
        """Measure one kind of data with everyone there is, and add its rows."""
        contenders: dict[str, Callable[[Job], Run]] = {"trimtab": ours}
        absent: dict[str, str] = {}
        theirs: dict[str, Callable[[Job], Run]] = {"TRL SFTTrainer": trl_trainer}
        if packs:
            theirs = {
                "TRL SFTTrainer, padding": trl_trainer,
                "TRL SFTTrainer, packing": partial(trl_trainer, packing=True),
            }
        else:
            theirs["transformers Trainer"] = transformers_trainer
        for name, run in theirs.items():
            why = missing(*(["trl", "datasets"] if "TRL" in name else ["transformers", "datasets"]))
            if why is None:
                contenders[name] = run
            else:
                absent[name] = why
        progress(f"{title}: losses of {self.options.curve_steps} steps")
        curves = {n: run(job.first(self.options.curve_steps)).losses for n, run in contenders.items()}
        timed = job.first(self.options.steps)
        turns: dict[str, Callable[[], Sample]] = {
            name: (lambda run=run: run(timed).sample) for name, run in contenders.items()
        }
        self._note(title, alternate(turns, self.options.rounds, warm_ups=0), curves, absent)

    def _note(
        self,
        title: str,
        samples: dict[str, list[Sample]],
        curves: dict[str, list[float]],
        absent: dict[str, str],
    ) -> None:
        record: dict[str, Any] = {}
        for name, taken in samples.items():
            faster = None if name == "trimtab" else ratio(samples["trimtab"], taken)
            comparable = name != "trimtab" and "packing" not in name
            apart = _apart(curves["trimtab"], curves[name]) if comparable else None
            record[name] = {
                "tokens_s": rate(taken),
                "rounds": [s.rate for s in taken],
                "trimtab_faster": faster,
                "losses": curves[name],
                "greatest_loss_difference": apart,
            }
            shown = "-" if apart is None else f"{apart:.1e}"
            self.speeds.add(title, name, f"{rate(taken):.0f}", ratio_text(faster), shown)
        for name, why in absent.items():
            record[name] = None
            self.speeds.add(title, name, why, "-", "-")
        self.records[title] = record

    def finish(self) -> None:
        claims = []
        for title, record in self.records.items():
            for name, found in record.items():
                if name == "trimtab":
                    continue
                value = found["trimtab_faster"]["median"] if found else None
                claims.append(Claim(f"{title}, times {name}", value, TARGET, why=f"{name} is not here"))
            apart = [r["greatest_loss_difference"] for r in record.values() if r]
            apart = [value for value in apart if value is not None]
            greatest = max(apart) if apart else None
            name = f"{title}, greatest loss difference"
            claims.append(Claim(name, greatest, NOISE, at_most=True, why="nobody to compare with is here"))
        packages = ("transformers", "trl", "accelerate", "datasets")
        found = {p: importlib.metadata.version(p) for p in packages if missing(p) is None}
        record = {"results": self.records, "trainers": found}
        finish("training", [self.speeds], claims, record, self.options)


def _job(segments: list[Segment], steps: int, each: int, rows: int, longest: int) -> Job:
    """`segments` dealt out, `each` of them a step."""
    assert len(segments) >= steps * each, (len(segments), steps, each)
    return Job([segments[i * each : (i + 1) * each] for i in range(steps)], rows, longest)


def _apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _tokens(data: str | None, count: int) -> Iterator[int]:
    """The first `count` tokens of the texts, again and again where there are fewer."""
    tokenizer = trimtab.load().tokenizer
    assert tokenizer is not None
    given = 0
    while True:
        for text in _texts(data):
            for token in tokenizer.encode(text, add_special_tokens=False):
                yield token
                given += 1
                if given == count:
                    return


def _texts(data: str | None) -> Iterator[str]:
    if data is None:
        yield shipped_text()
        return
    for path in find_files([data], Path()):
        for record in iterate_records(path, ["text"]):
            yield record.values["text"]


if __name__ == "__main__":
    main()
