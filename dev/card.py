"""A shipped model's card: a text from `cards/`, with what was measured and how it was trained filled in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

from trimtab.errors import ConfigError
from trimtab.models.transformer import Model
from trimtab.skills import SKILLS
from trimtab.training.watching.metrics import read_lines

TEMPLATES = Path(__file__).parent / "cards"


def card(name: str, model: Model, figures: dict[str, Any], runs: Sequence[Path]) -> str:
    """The card of the model `name` as Markdown. ConfigError where there is no text for that name."""
    file = TEMPLATES / f"{name}.md"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.md")))
        raise ConfigError(f"there is no card for {name!r} in {TEMPLATES}; there are {names}")
    filled = {"shape": shape_rows(model), "figures": figure_rows(figures), "runs": run_table(runs)}
    return Template(file.read_text(encoding="utf-8")).substitute(filled)


def shape_rows(model: Model) -> str:
    """Rows of a table of two columns: what the model is."""
    c = model.config
    assert model.tokenizer is not None
    head = "tied embeddings" if c.tie_word_embeddings else "a head of its own"
    parameters = (
        f"{model.num_parameters() / 1e6:.2f}M: width {c.hidden_size}, {c.num_layers} layers, {c.num_heads} "
        f"heads, {c.num_kv_heads} KV heads of {c.head_dim}, feed-forward {c.intermediate_size}, {head}"
    )
    rows = {
        "layout": "Llama, as Hugging Face stores it: bf16 safetensors",
        "parameters": parameters,
        "context": f"{c.context_length:,} tokens, rope base {c.rope.theta:,.0f}",
        "tokenizer": f"byte-level BPE, {c.vocab_size:,} tokens, digits split",
        "licence": "Apache-2.0, like the package",
    }
    return "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def figure_rows(figures: dict[str, Any]) -> str:
    """Rows of a table of two columns: what was measured. Every figure is in it, the bad ones too."""
    books = figures["books"]
    rows = [
        (
            f"{books['books']} held-out books, {books['tokens']:,} tokens in windows of {books['window']:,}",
            f"{books['bits_per_byte']:.3f} bits per byte, perplexity {books['perplexity']:.1f} per token",
        )
    ]
    for length, figure in figures["passkeys"].items():
        rows.append((f"passkey in {length} tokens of prose", _share(figure)))
    for name, figure in figures["skills"].items():
        if name != "passkey":  # told by length above
            rows.append((f"{name}: {SKILLS[name].title}", _share(figure)))
    if "guesses" in figures:
        guesses = figures["guesses"]
        rows.append(("same likeliest next token as `tiny`, on held-out books", f"{guesses['agreement']:.2f}"))
        rows.append(("expected acceptance by `tiny` at temperature 1", f"{guesses['acceptance']:.2f}"))
    return "\n".join(f"| {what} | {value} |" for what, value in rows)


def _share(figure: dict[str, Any]) -> str:
    return f"{figure['share']:.3f} ± {figure['stderr']:.3f} (n = {figure['n']})"


def run_table(runs: Sequence[Path]) -> str:
    """A table of the training runs, one after another: data, tokens, optimiser, final held-out loss, time."""
    lines = ["| run | data | tokens | optimiser | held-out loss | hours |", "|---|---|---|---|---|---|"]
    for number, run in enumerate(runs, 1):
        records = metrics_of(run)
        losses = [record["validation_loss"] for record in records if "validation_loss" in record]
        recipe = _recipe(run)
        optimizer = recipe.get("optimizer") or {}
        cells = (
            str(number),
            _mixture(recipe.get("mixture") or []),
            f"{records[-1]['tokens'] / 1e6:.1f}M in {records[-1]['step']:,} steps",
            f"{optimizer.get('name', 'muon')}, {optimizer.get('lr', 2e-3):g}",
            f"{losses[-1]:.3f}" if losses else "–",
            f"{records[-1]['seconds'] / 3600:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run's steps; ConfigError where there are none."""
    found = read_lines(run / "metrics.jsonl")
    if not found:
        raise ConfigError(
            f"{run} is not the output of a training run: it has no metrics.jsonl with steps in it"
        )
    return found


def _recipe(run: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{run} has no recipe.yaml, so its card cannot tell how it was trained") from None


def _mixture(parts: list[dict[str, Any]]) -> str:
    """Names and shares of a recipe's mixture; never its paths, which mean nothing elsewhere."""
    weights = [float(part.get("weight", 1)) for part in parts]
    pairs = zip(parts, weights, strict=True)
    named = [f"{part.get('name', part['kind'])} {weight / sum(weights):.0%}" for part, weight in pairs]
    return ", ".join(named)


def figures_of(model: Model, file: Path) -> dict[str, Any]:
    """What `measure_models.py` wrote of this very model; ConfigError where it measured others."""
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))["models"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{file} holds no figures ({error}); make them with dev/measure_models.py"
        ) from None
    if model.fingerprint() not in measured:
        raise ConfigError(f"{file} has no figures of {model.path}; measure it with dev/measure_models.py")
    return measured[model.fingerprint()]
