"""From a report to its HTML page: what the template is given, and the template's rendering."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.evaluation.charts import Axis, Point, heat_map, scatter
from trimtab.evaluation.report import Column, PlanInfo, Report, format_number, format_value
from trimtab.pages import shell

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

    from trimtab.registry import Card

ERRORS_SHOWN = ("share", "")  # units whose standard error stands beside the value


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the main table: the value, and a smaller second line."""

    text: str
    below: str = ""
    best: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG with the words under it."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Measured:
    """All metrics of one task: names, and for each plan its cells."""

    title: str
    label: str
    names: list[str]
    lines: list[tuple[str, list[str]]]


def render(report: Report) -> str:
    """The page as text."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            columns=report.columns,
            lines=[(plan, cells(report, plan)) for plan in report.plans],
            pictures=pictures(report),
            heat_maps=heat_maps(report),
            measured=measured(report),
            notes=sorted({note for row in report.rows for note in row.notes}),
            methods=_methods(report),
            model_line=_model_line,
            option_text=_option_text,
        )
    )


def environment() -> jinja2.Environment:
    """What the pages' templates are rendered with."""
    environment = shell.environment("trimtab.evaluation")
    environment.filters |= {"breakable": _breakable, "prose": _prose}
    return environment


def _breakable(label: str) -> Markup:
    """A plan's name that may be broken into lines after its separators."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[:,])", label))


def _prose(text: str) -> Markup:
    """A card's sentence with what stands between backticks set as code."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def cells(report: Report, plan: PlanInfo) -> list[Cell]:
    """A plan's line of the main table."""
    found = []
    for column in report.columns:
        row = report.row(plan.label, column.task)
        metric = row.metrics.get(column.metric)
        if row.error is not None:
            found.append(Cell("failed", failed=True))
        elif metric is None:
            found.append(Cell(""))
        else:
            best = plan.label in report.best(column)
            found.append(Cell(format_value(metric), _below(report, plan.label, column), best))
    return found


def _below(report: Report, plan: str, column: Column) -> str:
    """The standard error of a quality, or how many times the first plan's value it is."""
    metric = report.metric(plan, column)
    assert metric is not None
    if metric.stderr is not None and column.unit in ERRORS_SHOWN:
        return f"± {format_number(metric.stderr, column.unit).removesuffix('%')}"
    ratio = report.ratio(plan, column)
    if column.unit in ("B", "s", "tok/s") and ratio is not None and plan != report.reference:
        return f"{ratio:.2f}×"
    return ""


def pictures(report: Report) -> list[Picture]:
    """Each quality against bytes and against speed, for all plans that have both."""
    found = []
    words = {"bytes": "memory", "speed": "speed"}
    quality, size, speed = (_on_axis(report, axis) for axis in ("quality", "bytes", "speed"))
    for q in quality:
        for axis, x in [*(("bytes", c) for c in size[:1]), *(("speed", c) for c in speed[:1])]:
            points = _points(report, x, q)
            if len(points) >= 2:
                svg = scatter(points, _axis(x), _axis(q))
                found.append(Picture(svg, f"{_sentence(q.label)} and {words[axis]}"))
    return found


def _on_axis(report: Report, axis: str) -> list[Column]:
    found: dict[str, Column] = {}
    for row in report.rows:
        for name, m in row.metrics.items():
            if m.axis == axis and m.label not in found:
                found[m.label] = Column(m.label, row.task, name, m.unit, m.better, m.title or m.label)
    return list(found.values())


def _axis(column: Column) -> Axis:
    assert column.better is not None
    return Axis(_sentence(column.title), column.unit, column.better)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _points(report: Report, x: Column, y: Column) -> list[Point]:
    points = []
    for plan in report.plans:
        mx, my = report.metric(plan.label, x), report.metric(plan.label, y)
        at = [m.value for m in (mx, my) if m is not None and m.value is not None and math.isfinite(m.value)]
        if len(at) == 2:
            change = report.change(plan.label, y)
            points.append(Point(plan.label, at[0], at[1], change.stderr if change else None))
    return points


def heat_maps(report: Report) -> list[tuple[str, str, list[Picture]]]:
    """For each task that has a grid: its name, what the grid shows, and one picture a plan."""
    found = []
    for task in report.tasks:
        rows = [r for r in report.rows if r.task == task.label and "accuracy" in r.detail]
        if not rows:
            continue
        some = rows[0].detail
        about = (
            f"Share of {some['samples']} right answers in percent, by prompt length in tokens (across) and "
            "depth of the needle (down: 0% is the start of the prompt). "
            + (
                "The question arrives after the prompt has been compressed."
                if some["question"] == "hidden"
                else "The question ends the prompt."
            )
        )
        grids = [
            Picture(
                heat_map(
                    row.detail["accuracy"],
                    [str(n) for n in row.detail["lengths"]],
                    [f"{100 * d:.0f}%" for d in row.detail["depths"]],
                    f"{row.plan}: needle accuracy by length and depth",
                ),
                row.plan,
            )
            for row in rows
        ]
        found.append((task.label, about, grids))
    return found


def measured(report: Report) -> list[Measured]:
    """Every metric of every task, for the reader who wants all of it."""
    tables = []
    for task in report.tasks:
        rows = {r.plan: r for r in report.rows if r.task == task.label and r.error is None}
        names = list(dict.fromkeys(name for row in rows.values() for name in row.metrics))
        lines = []
        for name in names:
            metrics = [rows[p.label].metrics.get(name) if p.label in rows else None for p in report.plans]
            texts = []
            for m in metrics:
                error = "" if m is None or m.stderr is None else f" ± {format_number(m.stderr, m.unit)}"
                texts.append("" if m is None else format_value(m) + error)
            unit = next((m.unit for m in metrics if m is not None), "")
            shown = f" ({unit})" if unit not in ("", "B", "s", "share") else ""
            lines.append((name.replace("_", " ") + shown, texts))
        if lines:
            tables.append(Measured(task.card.title, task.label, [p.label for p in report.plans], lines))
    return tables


def _methods(report: Report) -> list[tuple[list[PlanInfo], Card]]:
    """Each cache policy's card once, with the plans that use it."""
    found: dict[str, tuple[list[PlanInfo], Card]] = {}
    for plan in report.plans:
        found.setdefault(plan.settings["cache"]["name"], ([], plan.card))[0].append(plan)
    return list(found.values())


def _model_line(model: dict[str, Any]) -> str:
    size = model["parameters"]
    scale, letter = next((s, n) for s, n in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if size >= s or n == "K")
    per_token = format_number(model["kv_bytes_per_token"], "B")
    return (
        f"{size / scale:.1f}{letter} parameters · {model['layers']} layers · {model['dtype']} · context "
        f"{model['context']:,} · full cache {per_token} per token"
    )


def _option_text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "+".join(map(str, value))
    return "none" if value is None else str(value)
