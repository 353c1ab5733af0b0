"""The result of a comparison: rows, a terminal table, `results.jsonl` and `report.html`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.evaluation.tasks.base import Better, Metric
from trimtab.pages.numbers import finite, format_number
from trimtab.registry import Card

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class PlanInfo:
    """A measured plan: its short name, every setting, the backend that ran it, its cache policy's card."""

    label: str
    settings: dict[str, Any]
    backend: str | None
    card: Card


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task as it was asked for, with every option and its card."""

    label: str
    name: str
    options: dict[str, Any]
    card: Card


@dataclass(frozen=True, slots=True)
class Row:
    """What one task found out about one plan; `error` says why there is nothing."""

    plan: str
    task: str
    metrics: dict[str, Metric] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the main table: a labelled metric of one task."""

    label: str
    task: str
    metric: str
    unit: str
    better: Better | None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of a comparison. The first plan is the one the others are measured against."""

    plans: list[PlanInfo]
    tasks: list[TaskInfo]
    rows: list[Row]
    models: list[dict[str, Any]]
    provenance: dict[str, Any]

    def row(self, plan: str, task: str) -> Row:
        return next(r for r in self.rows if r.plan == plan and r.task == task)

    def metric(self, plan: str, column: Column) -> Metric | None:
        """The metric of a plan in a column; None where the task failed or did not apply."""
        return self.row(plan, column.task).metrics.get(column.metric)

    @property
    def reference(self) -> str:
        """The first plan's name."""
        return self.plans[0].label

    @property
    def columns(self) -> list[Column]:
        """Memory first, then the tasks' labelled metrics in order; one column a label."""
        found: dict[str, Column] = {}
        memory: set[str] = set()
        for task in self.tasks:
            for plan in self.plans:
                for name, metric in self.row(plan.label, task.label).metrics.items():
                    if metric.label and metric.label not in found:
                        column = Column(metric.label, task.label, name, metric.unit, metric.better)
                        found[metric.label] = column
                        if name.startswith("kv_"):
                            memory.add(metric.label)
        return sorted(found.values(), key=lambda c: c.label not in memory)

    def best(self, column: Column) -> set[str]:
        """Plans that read best in a column, as shown; empty when all read alike or nothing is better."""
        metrics = {p.label: self.metric(p.label, column) for p in self.plans}
        shown = {label: m for label, m in metrics.items() if m is not None and m.value is not None}
        if column.better is None or len({format_value(m) for m in shown.values()}) < 2:
            return set()
        pick = min if column.better == "lower" else max
        top = format_value(pick(shown.values(), key=lambda m: m.value or 0.0))
        return {label for label, m in shown.items() if format_value(m) == top}

    def ratio(self, plan: str, column: Column) -> float | None:
        """A plan's value over the first plan's; None where either is missing or zero."""
        ours, theirs = self.metric(plan, column), self.metric(self.reference, column)
        return _ratio(ours, theirs)

    def change(self, plan: str, column: Column) -> Metric | None:
        """The difference to the first plan on the same prompts, where the task tells it."""
        metrics = self.row(plan, column.task).metrics.values()
        return next((m for m in metrics if m.change_of == column.metric), None)

    @property
    def errors(self) -> list[Row]:
        return [row for row in self.rows if row.error is not None]

    def table(self) -> Table:
        """The main table for a terminal; the best of each column is bold."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("plan", no_wrap=True)
        columns = self.columns
        for column in columns:
            table.add_column(Text(column.label), justify="right")
        best = {c.label: self.best(c) for c in columns}
        for plan in self.plans:
            cells = [Text(plan.label)]
            for c in columns:
                metric = self.metric(plan.label, c)
                failed = self.row(plan.label, c.task).error is not None
                text = "failed" if failed else "" if metric is None else format_value(metric)
                style = "red" if failed else "bold green" if plan.label in best[c.label] else ""
                cells.append(Text(text, style=style))
            table.add_row(*cells)
        return table

    def records(self) -> list[dict[str, Any]]:
        """One plain mapping for each pair of plan and task: what `results.jsonl` holds."""
        plans = {p.label: p for p in self.plans}
        tasks = {t.label: t for t in self.tasks}
        found = []
        for row in self.rows:
            theirs = self.row(self.reference, row.task).metrics
            metrics = {
                name: {**dataclasses.asdict(m), "ratio_to_first": _ratio(m, theirs.get(name))}
                for name, m in row.metrics.items()
            }
            plan, task = plans[row.plan], tasks[row.task]
            found.append(
                {
                    "plan": row.plan,
                    "task": row.task,
                    "error": row.error,
                    "metrics": metrics,
                    "detail": row.detail,
                    "notes": list(row.notes),
                    "seconds": round(row.seconds, 3),
                    "settings": plan.settings,
                    "backend": plan.backend,
                    "options": task.options,
                    "models": self.models,
                    **self.provenance,
                }
            )
        return found

    def to_jsonl(self) -> str:
        """`records`, one line of strict JSON each; numbers that are not finite become null."""
        lines = [json.dumps(finite(r), ensure_ascii=False, allow_nan=False) for r in self.records()]
        return "".join(f"{line}\n" for line in lines)

    def to_html(self) -> str:
        """One self-contained page."""
        from trimtab.evaluation.page import render

        return render(self)

    def write(self, folder: str | Path) -> list[Path]:
        """Write `results.jsonl` and `report.html` into `folder`, both or neither; their paths.

        Raises OutputError when the folder cannot be written to.
        """
        from trimtab.evaluation.files import write_all

        files = {"results.jsonl": self.to_jsonl().encode(), "report.html": self.to_html().encode()}
        return write_all(Path(folder), files)


def _ratio(ours: Metric | None, theirs: Metric | None) -> float | None:
    if ours is None or theirs is None or ours.value is None or not theirs.value:
        return None
    return ours.value / theirs.value


def format_value(metric: Metric) -> str:
    """A metric's value for people, with its unit."""
    return format_number(metric.value, metric.unit, signed=metric.label.startswith("Δ"))
