"""Measure models for their cards: held-out books, skills, passkeys, and how well one guesses another.

    BOOKS=path/to/books python dev/measure_models.py runs/tiny/model runs/draft/model \
        --target runs/tiny/model --out figures.json

`$BOOKS` holds `valid.jsonl.zst`, books that were not trained on. The figures of each model are kept under its
fingerprint, by which `ship.py` finds them, so a card never shows another model's figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import trimtab
from trimtab.cli.common import note, plain
from trimtab.errors import ConfigError, TrimtabError
from trimtab.evaluation.provenance import provenance
from trimtab.evaluation.tasks.base import Metric, TaskContext
from trimtab.evaluation.tasks.skills import Skills, SkillsOptions
from trimtab.models.transformer import Model
from trimtab.training.data.readers import read_records

HELD_OUT = "valid.jsonl.zst"
PASSKEYS = (300, 1000, 1900)  # tokens of prose around the number
AGREEMENT_WINDOWS = 32


def main() -> None:
    args = parser().parse_args()
    try:
        report = measure(args)
    except TrimtabError as error:
        sys.exit(f"error: {error}")
    args.out.write_text(json.dumps(plain(report), indent=1) + "\n", encoding="utf-8")
    print(side_by_side(args.models, list(report["models"].values())))
    note(f"written: {args.out}")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Measure models for their cards.")
    found.add_argument("models", nargs="+", metavar="MODEL", help="folders or names of shipped models")
    found.add_argument("--target", metavar="MODEL", help="the model whose words smaller ones are to guess")
    found.add_argument("--out", type=Path, default=Path("figures.json"))
    found.add_argument("--samples", type=int, default=200, help="exercises per skill and passkey length")
    found.add_argument("--characters", type=int, help="of each held-out book; default: all of it")
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all models, by fingerprint, and how they came about."""
    books = held_out_books(args.characters)
    target = None if args.target is None else trimtab.load(args.target, dtype="float32")
    found: dict[str, Any] = {}
    for name in args.models:
        model = trimtab.load(name, dtype="float32")
        note(f"{name}: {model.num_parameters():,} parameters")
        figures = {"books": book_figures(model, books), **skill_figures(model, args.samples)}
        if target is not None and model.num_parameters() < target.num_parameters():
            figures["guesses"] = guess_figures(model, target, books)
        found[model.fingerprint()] = figures
    made = {key: provenance(0)[key] for key in ("date", "versions", "commit")}
    return {"models": found, "characters": args.characters, "made": made}


def held_out_books(characters: int | None = None) -> list[str]:
    """The texts of the held-out books, or the first `characters` of each."""
    folder = os.environ.get("BOOKS")
    if folder is None:
        raise ConfigError(f"BOOKS is not set; let it name the folder that holds {HELD_OUT}")
    file = Path(folder) / HELD_OUT
    if not file.is_file():
        raise ConfigError(f"BOOKS is {folder!r}, where there is no {HELD_OUT}")
    return [record["text"][:characters] for record in read_records(file)]


def windows(model: Model, text: str) -> Iterator[torch.Tensor]:
    """Token ids int64 `[T]` of each window of a text: the first token and then at most a context less one.

    Every token of the text is in one window and is predicted there once.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None and tokenizer.bos_id is not None
    ids = tokenizer.encode(text, add_special_tokens=False)
    size = model.config.context_length - 1
    for start in range(0, len(ids), size):
        yield torch.tensor([tokenizer.bos_id, *ids[start : start + size]])


@torch.inference_mode()
def book_figures(model: Model, books: list[str]) -> dict[str, Any]:
    """Bits per byte and perplexity of whole books, each window of the model's context by itself."""
    loss, tokens = 0.0, 0
    for number, book in enumerate(books, 1):
        for window in windows(model, book):
            logits = model(window[None, :-1])[0]
            loss += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            tokens += len(window) - 1
        note(f"  book {number} of {len(books)}")
    size = sum(len(book.encode()) for book in books)
    return {
        "bits_per_byte": loss / math.log(2) / size,
        "perplexity": math.exp(loss / tokens),
        "tokens": tokens,
        "bytes": size,
        "books": len(books),
        "window": model.config.context_length,
    }


def skill_figures(model: Model, samples: int) -> dict[str, Any]:
    """The share of right greedy answers to held-out exercises, and to passkeys in more and more prose."""
    engine = trimtab.Engine(model)
    found = Skills(SkillsOptions(samples=samples)).run(engine, TaskContext()).metrics
    skills = {name: share(metric) for name, metric in found.items() if name != "accuracy"}
    note("  skills: " + ", ".join(f"{name} {figure['share']:.2f}" for name, figure in skills.items()))
    passkeys = {}
    for length in PASSKEYS:
        task = Skills(SkillsOptions(skills=("passkey",), samples=samples, passkey=length))
        passkeys[str(length)] = share(task.run(engine, TaskContext()).metrics["passkey"])
    note("  passkeys: " + ", ".join(f"{length}: {f['share']:.2f}" for length, f in passkeys.items()))
    return {"skills": skills, "passkeys": passkeys}


def side_by_side(names: list[str], figures: list[dict[str, Any]]) -> str:
    """A Markdown table of all figures, one column a model."""
    rows: dict[str, list[str]] = {
        "held-out books, bits per byte": [f"{f['books']['bits_per_byte']:.3f}" for f in figures],
    }
    for length in PASSKEYS:
        shares = [f["passkeys"][str(length)]["share"] for f in figures]
        rows[f"passkey in {length:,} tokens"] = [f"{value:.2f}" for value in shares]
    for skill in figures[0]["skills"]:
        rows[f"`{skill}`"] = [f"{f['skills'][skill]['share']:.2f}" for f in figures]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    lines += [f"| {what} | {' | '.join(cells)} |" for what, cells in rows.items()]
    return "\n".join(lines)


def share(metric: Metric) -> dict[str, Any]:
    return {"share": metric.value, "stderr": metric.stderr, "n": metric.n}


@torch.inference_mode()
def guess_figures(draft: Model, target: Model, books: list[str]) -> dict[str, Any]:
    """How often both models' likeliest next token is the same, and the acceptance of sampled guesses.

    Over windows of held-out books. A guess drawn from q is accepted by a target p with probability
    sum(min(p, q)) (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2022,
    arXiv 2211.17192).
    """
    found = [window for book in books for window in windows(draft, book)]
    chosen = found[:: math.ceil(len(found) / AGREEMENT_WINDOWS)]
    same, accepted, count = 0, 0.0, 0
    for window in chosen:
        p, q = target(window[None])[0], draft(window[None])[0]
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        accepted += torch.minimum(p.softmax(-1), q.softmax(-1)).sum().item()
        count += len(window)
    return {"agreement": same / count, "acceptance": accepted / count, "tokens": count}


if __name__ == "__main__":
    main()
