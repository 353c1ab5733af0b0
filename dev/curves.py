"""The losses of training runs that follow one another, as one small SVG picture that stands by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.training.watching.report.curves import HEIGHT, WIDTH, Curve, picture, smoothed

# The report's page has these rules in its style sheet; a picture beside a card has to bring them.
STYLE = (
    "text { font: 12px sans-serif; fill: #5d6670 } .grid { stroke: #e2dfd7 } "
    ".curve { fill: none; stroke-width: 1.8 } .c0 { stroke: #0a6177 } .c1 { stroke: #c2410c } "
    "text.c0 { fill: #0a6177; stroke: none } "
    "text.c1 { fill: #c2410c; stroke: none } circle.c1 { fill: #c2410c }"
)


def losses(runs: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The picture; each run is the lines of its metrics.jsonl in order. Steps are counted on from run to run.

    The running mean starts afresh with each run, for its data may be others.
    """
    training, validation, before = [], [], 0
    for records in runs:
        training += smoothed([(before + r["step"], r["loss"]) for r in records])
        validation += [(before + r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
        before += records[-1]["step"]
    curves = [Curve("training, running mean", training), Curve("held-out", validation, "dots", colour=1)]
    inside = f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    head, mark, rest = picture(curves, "loss, nats a token").partition(">")
    return head + mark + inside + rest + "\n"
