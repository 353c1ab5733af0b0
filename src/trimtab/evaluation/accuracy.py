"""Shares of right answers as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.evaluation.statistics import mean, proportion_error, standard_error
from trimtab.evaluation.tasks.base import Metric, TaskResult


def accuracy(right: Sequence[bool], **more: Any) -> Metric:
    """The share of right answers with its standard error; `more` goes to the metric as it is."""
    return Metric(
        mean(right), "share", "higher", proportion_error(sum(right), len(right)), len(right), **more
    )


def accuracy_change(result: TaskResult, reference: TaskResult) -> dict[str, Metric]:
    """How the metric `accuracy` changed, answer by answer, from both results' detail `right`."""
    ours, theirs = result.detail["right"], reference.detail["right"]
    differences = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    error = standard_error(differences)
    change = Metric(mean(differences), "share", "higher", error, len(differences), change_of="accuracy")
    return {"accuracy_change": change}
