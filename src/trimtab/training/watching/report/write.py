"""`report.html` of a run, from the files in its folder."""

from __future__ import annotations

import datetime
import functools
import math
import statistics
from typing import TYPE_CHECKING, Any

from trimtab import hardware
from trimtab.models.transformer import Model
from trimtab.pages.numbers import format_number
from trimtab.pages.shell import environment
from trimtab.training.data.mixture import Mixture
from trimtab.training.data.sources.base import Source
from trimtab.training.keeping import resuming
from trimtab.training.keeping.folder import RunFolder, write_whole
from trimtab.training.recipe import Recipe
from trimtab.training.watching.metrics import read_lines
from trimtab.training.watching.progress import duration
from trimtab.training.watching.report.curves import Curve, picture, smoothed

if TYPE_CHECKING:
    import jinja2

LAST = 20  # steps whose mean is called the last loss

Records = list[dict[str, Any]]


def write_report(
    folder: RunFolder,
    recipe: Recipe,
    model: Model,
    source: Source,
    data_state: dict[str, Any],
    unit: str = "token",
) -> None:
    """Write the page of the run in `folder`.

    `data_state` is the source's after the last step, `unit` what a loss is the mean over.
    """
    import trimtab

    records = read_lines(folder.metrics)
    machine = hardware.describe()
    page = (
        _environment()
        .get_template("run.html.j2")
        .render(
            name=folder.path.resolve().name,
            model_line=(
                f"{model.num_parameters():,} parameters · {model.config.num_layers} layers · "
                f"width {model.config.hidden_size} · vocabulary {model.config.vocab_size:,}"
            ),
            step=records[-1]["step"] if records else 0,
            steps=recipe.steps,
            figures=figures(records, unit),
            pictures=pictures(records, unit),
            shares=data_shares(source, data_state),
            samples=read_lines(folder.samples)[::-1],
            settings=flat(resuming.settings_of(recipe)),
            machine={key: value for key, value in machine.items() if value is not None},
            version=trimtab.__version__,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    write_whole(folder.report, page)


@functools.cache
def _environment() -> jinja2.Environment:
    return environment("trimtab.training.watching.report")


def pictures(records: Records, unit: str = "token") -> list[tuple[str, str]]:
    """Heading and SVG of each curve that has values."""

    def points(key: str) -> list[tuple[float, float]]:
        return [(r["step"], r[key]) for r in records if key in r]

    loss = [
        Curve("each step", points("loss"), "faint"),
        Curve("training", smoothed(points("loss"))),
        Curve("validation", points("validation_loss"), "dots", colour=1),
    ]
    found = [
        (f"Loss, nats per {unit}", picture(loss, "loss")),
        (
            "Validation, bits per byte",
            picture([Curve("bits per byte", points("validation_bits_per_byte"), "dots")], "bits per byte"),
        ),
        ("Learning rate", picture([Curve("rate", points("lr"))], "learning rate", from_zero=True)),
        (
            "Norm of the gradient, before clipping",
            picture([Curve("norm", points("grad_norm"))], "gradient norm", from_zero=True),
        ),
        (
            "Tokens a second",
            picture([Curve("speed", points("tokens_per_second"))], "tokens a second", from_zero=True),
        ),
    ]
    return [(heading, svg) for heading, svg in found if svg]


def figures(records: Records, unit: str = "token") -> list[tuple[str, str]]:
    """What the run came to, in words and numbers."""
    if not records:
        return []
    last = records[-1]
    validated = [r for r in records if "validation_loss" in r]
    speed = statistics.median(r["tokens_per_second"] for r in records)
    found = [
        ("tokens seen", f"{last['tokens']:,}"),
        ("time in steps", duration(last["seconds"])),
        (f"training loss, mean of the last {LAST} steps", _mean_loss(records[-LAST:])),
    ]
    if validated:
        final = validated[-1]
        best = min(validated, key=lambda r: r["validation_loss"])
        found.append((f"validation loss, nats per {unit}", f"{final['validation_loss']:.4f}"))
        found.append(("lowest so far", f"{best['validation_loss']:.4f} at step {best['step']:,}"))
        found.append(("validation perplexity", format_number(math.exp(min(final["validation_loss"], 700.0)))))
        if "validation_accuracy" in final:
            found.append(("validation, share classified right", f"{final['validation_accuracy']:.1%}"))
        if "validation_bits_per_byte" in final:
            found.append(("validation, bits per byte", f"{final['validation_bits_per_byte']:.4f}"))
    found.append(("tokens a second, median", f"{speed:,.0f}"))
    shares = [r["flops_share"] for r in records if "flops_share" in r]
    if shares:
        found.append(("of the machine's fastest matrix product, median", f"{statistics.median(shares):.0%}"))
    return found


def _mean_loss(records: Records) -> str:
    return f"{statistics.fmean(r['loss'] for r in records):.4f}"


def data_shares(source: Source, state: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, wanted share, share taken and tokens of each source of a mixture."""
    if not isinstance(source, Mixture):
        return []
    taken = state["taken"]
    total = sum(taken) or 1
    return [
        (name, f"{100 * share:.1f}%", f"{100 * tokens / total:.1f}%", f"{tokens:,}")
        for name, share, tokens in zip(source.names, source.shares, taken, strict=True)
    ]


def flat(settings: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and values."""
    if isinstance(settings, dict):
        pairs = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list) and any(isinstance(item, (dict, list)) for item in settings):
        pairs = [(str(i), value) for i, value in enumerate(settings)]
    else:
        text = ", ".join(map(str, settings)) if isinstance(settings, list) else str(settings)
        return [(name, "none" if settings is None else text)]
    return [line for key, value in pairs for line in flat(value, f"{name}.{key}" if name else key)]
