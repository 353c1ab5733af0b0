"""The task seam: a task measures one thing about an engine and says how sure it is.

A task is one file in this folder:

    @TASKS.add(options=MyOptions, card=Card(...))
    class MyTask(Task):
        def run(self, engine, ctx) -> TaskResult: ...

Its options are a frozen dataclass. An option that holds a list has the type `tuple[int, ...]` and is
written `lengths=256+512+1024`. A task must give the same prompts for the same `ctx.seed`, whatever plan
it measures: plans are compared on equal questions.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trimtab.engine.engine import Engine

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured number.

    `value` is None when it could not be known; it is then reported as null, never as a guess.
    `unit` is `share` (0..1), `B`, `s`, `tok/s` or any short text.
    `stderr` is the standard error of `value` over `n` samples, where that makes sense.
    `better` says which direction is an improvement; None for a plain fact.
    `label` is the column title in tables; a metric without one is kept in the records only.
    `title` says the same in more words, for pictures; it defaults to the label.
    `axis` puts the metric on the pictures: `quality`, `bytes` or `speed`.
    `change_of` names the metric of which this one is the difference to the first plan's.
    """

    value: float | None
    unit: str = ""
    better: Better | None = None
    stderr: float | None = None
    n: int | None = None
    label: str = ""
    title: str = ""
    axis: Literal["quality", "bytes", "speed"] | None = None
    change_of: str = ""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a task found out about one plan.

    `detail` holds plain values for the records and the pictures (grids, single samples).
    `notes` are sentences a reader must know to read the numbers rightly.
    """

    metrics: Mapping[str, Metric]
    detail: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _no_progress(fraction: float) -> None:
    pass


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What a task is told besides the engine.

    `seed` decides every drawn prompt. `progress` takes the finished share of the task, 0..1.
    """

    seed: int = 0
    progress: Callable[[float], None] = _no_progress


class Task(abc.ABC):
    """One way to measure an engine. `options` is the dataclass the task was registered with."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abc.abstractmethod
    def run(self, engine: Engine, ctx: TaskContext) -> TaskResult:
        """Measure `engine`. User mistakes (a text that is too short, say) raise TrimtabError."""

    def relate(self, result: TaskResult, reference: TaskResult) -> Mapping[str, Metric]:
        """Metrics of `result` that mean something only beside the first plan's result on the same prompts.

        Two plans that answer the same prompts differ by much less than either is uncertain.
        """
        return {}


class AlternatingTask(Task):
    """A task that measures time, in short rounds, so that several plans can take turns.

    A machine that slows down for a while then slows all plans alike instead of the one whose turn it was.
    """

    @property
    @abc.abstractmethod
    def rounds(self) -> int:
        """How many rounds `run` takes."""

    @abc.abstractmethod
    def warm_up(self, engine: Engine, ctx: TaskContext) -> None:
        """Bring `engine` to the state that is measured (compiled, allocated, caches filled)."""

    @abc.abstractmethod
    def measure(self, engine: Engine, ctx: TaskContext, index: int) -> Any:
        """One round; equal `index` means equal work for every plan."""

    @abc.abstractmethod
    def summarise(self, engine: Engine, ctx: TaskContext, samples: list[Any]) -> TaskResult:
        """The result of the rounds measured so far."""

    def run(self, engine: Engine, ctx: TaskContext) -> TaskResult:
        self.warm_up(engine, ctx)
        samples = []
        for index in range(self.rounds):
            samples.append(self.measure(engine, ctx, index))
            ctx.progress((index + 1) / self.rounds)
        return self.summarise(engine, ctx, samples)
