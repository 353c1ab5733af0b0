"""`compare`: plans times tasks, on equal prompts, every failure recorded and none fatal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ConfigError, PlanError, TrimtabError
from trimtab.evaluation.provenance import provenance
from trimtab.evaluation.report import PlanInfo, Report, Row, TaskInfo
from trimtab.evaluation.tasks.base import AlternatingTask, Metric, Task, TaskContext, TaskResult
from trimtab.plan import MethodChoice, Plan
from trimtab.registry import KV_CACHES, TASKS

if TYPE_CHECKING:
    from trimtab.engine.engine import Engine
    from trimtab.models.config import ModelConfig
    from trimtab.models.transformer import Model

__all__ = ["DEFAULT_TASKS", "Progress", "Report", "compare"]

log = logging.getLogger("trimtab.evaluation")

DEFAULT_TASKS = ("perplexity", "needle", "skills", "speed")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a comparison stands: `finished` of `total` pairs of plan and task are done.

    `within` is the finished share (0..1) of the pair in work, which `plan` and `task` name.
    """

    plan: str
    task: str
    finished: int
    total: int
    within: float

    @property
    def share(self) -> float:
        """The finished share of everything, 0..1."""
        return (self.finished + self.within) / self.total


def compare(
    model: Model | str | Path | None = None,
    plans: Iterable[str | Plan | dict[str, Any]] = ("full",),
    tasks: Iterable[str | MethodChoice] = DEFAULT_TASKS,
    *,
    out: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    alternate: bool = True,
    seed: int = 0,
) -> Report:
    """Measure every plan with every task.

    Args:
        model: a loaded model, a folder or a hub id, for the plans that name none; None: the shipped one.
        plans: plans as `Plan.of` takes them. The first is what the others are measured against.
        tasks: names with options, e.g. `needle:lengths=256+512`.
        out: a folder for `results.jsonl` and `report.html`; None writes nothing.
        progress: called with a `Progress` whenever something is done.
        alternate: whether plans take turns in tasks that measure time (all engines are then held at once).
        seed: decides every drawn prompt; equal seeds give equal prompts.

    Raises ConfigError or PlanError, before any weight is loaded, when a plan or task cannot work, and
    OutputError when `out` cannot be written to. What fails later is recorded in its row.
    """
    if out is not None:
        from trimtab.evaluation.files import check_writable

        check_writable(Path(out))
    chosen = [MethodChoice.parse(task, TASKS) for task in _several(tasks, "task")]
    parsed = [_plan(value, model) for value in _several(plans, "plan")]
    _refuse_twins([str(choice) for choice in chosen], "task")
    _refuse_twins([_label(plan, parsed) for plan in parsed], "plan")
    _check(parsed, model)
    comparison = _Comparison(
        model=model,
        plans={_label(plan, parsed): plan for plan in parsed},
        tasks={str(choice): TASKS.get(choice.name).cls(choice.options) for choice in chosen},
        seed=seed,
        progress=progress or (lambda _: None),
    )
    comparison.run(alternate)
    report = comparison.report(chosen)
    if out is not None:
        report.write(out)
    return report


def _several(values: Any, what: str) -> list[Any]:
    """A list of choices; a lone string or mapping counts as a list of one."""
    found = [values] if isinstance(values, (str, dict, Plan, MethodChoice)) else list(values)
    if not found:
        raise ConfigError(f"compare needs at least one {what}")
    return found


def _plan(value: Any, model: Model | str | Path | None) -> Plan:
    plan = Plan.of(value)
    if isinstance(model, (str, Path)) and plan.model is None:
        return plan.with_(model=str(model))
    if model is not None and not isinstance(model, (str, Path)):
        asked = [
            f"{k}={getattr(plan, k)}"
            for k in ("model", "adapter", "dtype", "device")
            if _differs(plan, k, model)
        ]
        if asked:
            raise ConfigError(
                f"plan '{plan.label}' asks for {' and '.join(asked)}, but the model handed in is loaded "
                "already; give compare the model's folder instead"
            )
    return plan


def _differs(plan: Plan, setting: str, model: Model) -> bool:
    wanted = getattr(plan, setting)
    if setting in ("model", "adapter"):
        return wanted is not None
    actual = str(getattr(model, setting)).removeprefix("torch.")
    return wanted not in ("auto", actual)


def _label(plan: Plan, plans: Sequence[Plan]) -> str:
    """A plan's short name, with the model where the plans are about several."""
    several = len({p.model for p in plans}) > 1
    return f"{plan.label} model={plan.model or 'shipped'}" if several else plan.label


def _refuse_twins(labels: Sequence[str], what: str) -> None:
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"the {what} {label!r} is given twice; name each {what} once")


def _check(plans: Sequence[Plan], model: Model | str | Path | None) -> None:
    """All reasons why some plan cannot run its model, from configs alone."""
    configs: dict[str | None, ModelConfig] = {}
    reasons = []
    for plan in plans:
        if plan.model not in configs:
            configs[plan.model] = _config(plan.model, model)
        problems = plan.problems(configs[plan.model])
        reasons += [f"{plan.label}: {p}" for p in problems] if len(plans) > 1 else problems
    if reasons:
        raise PlanError(reasons)


def _config(name: str | None, model: Model | str | Path | None) -> ModelConfig:
    if name is None and model is not None and not isinstance(model, (str, Path)):
        return model.config
    from trimtab.models.config import config_from_folder
    from trimtab.models.hub import find_folder

    return config_from_folder(find_folder(name))


class _Comparison:
    """One run of `compare`: collects a row for every pair of plan and task."""

    def __init__(
        self,
        model: Model | str | Path | None,
        plans: dict[str, Plan],
        tasks: dict[str, Task],
        seed: int,
        progress: Callable[[Progress], None],
    ) -> None:
        self.model = model
        self.plans = plans
        self.tasks = tasks
        self.seed = seed
        self.progress = progress
        self.models: dict[tuple[str | None, str | None, str, str], Model] = {}
        self.backends: dict[str, str] = {}
        self.results: dict[tuple[str, str], TaskResult] = {}
        self.errors: dict[tuple[str, str], str] = {}
        self.seconds: dict[tuple[str, str], float] = {}

    def run(self, alternate: bool) -> None:
        turns = [n for n, t in self.tasks.items() if alternate and isinstance(t, AlternatingTask)]
        waiting: dict[str, Engine] = {}
        for label, plan in self.plans.items():
            made: list[Engine] = []
            if not self._attempt(label, list(self.tasks), lambda p=plan, m=made: m.append(self._engine(p))):
                continue
            engine = made[0]
            self.backends[label] = engine.backend
            for name in self.tasks:
                if name not in turns:
                    self._measure(label, name, engine)
            if turns:
                waiting[label] = engine
        for name in turns:
            self._take_turns(name, waiting)

    def _measure(self, label: str, name: str, engine: Engine) -> None:
        """One plan, one task, from start to end."""

        def work() -> None:
            self.results[label, name] = self.tasks[name].run(engine, TaskContext(self.seed, tell))

        def tell(fraction: float) -> None:
            self._tell(label, name, fraction)

        tell(0.0)
        self._attempt(label, [name], work)
        tell(0.0)

    def _take_turns(self, name: str, engines: dict[str, Engine]) -> None:
        """Rounds of an alternating task: in each, every plan that still stands has one turn."""
        task = self.tasks[name]
        assert isinstance(task, AlternatingTask)
        ctx = TaskContext(self.seed)
        samples: dict[str, list[Any]] = {label: [] for label in engines}
        for index in range(-1, task.rounds):
            for label, engine in engines.items():
                if (label, name) in self.errors:
                    continue
                standing = sum((e, name) not in self.errors for e in engines)
                self._tell(label, name, (index + 1) / (task.rounds + 1), beside=standing)

                def work(e: Engine = engine, i: int = index, taken: list[Any] = samples[label]) -> None:
                    if i < 0:
                        task.warm_up(e, ctx)
                    else:
                        taken.append(task.measure(e, ctx, i))

                self._attempt(label, [name], work)
        for label, engine in engines.items():
            if (label, name) not in self.errors:

                def conclude(e: Engine = engine, key: tuple[str, str] = (label, name)) -> None:
                    self.results[key] = task.summarise(e, ctx, samples[key[0]])

                self._attempt(label, [name], conclude)
            left = sum((e, name) not in self.results and (e, name) not in self.errors for e in engines)
            self._tell(label, name, 1.0, beside=left)

    def _attempt(self, label: str, names: list[str], work: Callable[[], None]) -> bool:
        """Do `work` for these tasks; a failure is recorded for all of them, and the rest goes on."""
        start = time.perf_counter()
        try:
            work()
        except Exception as error:
            if not isinstance(error, TrimtabError):
                log.error("%s failed on %s", label, ", ".join(names), exc_info=error)
            said = str(error) if isinstance(error, TrimtabError) else f"{type(error).__name__}: {error}"
            self.errors |= {(label, name): said for name in names}
            return False
        finally:
            for name in names:
                self.seconds[label, name] = self.seconds.get((label, name), 0.0) + time.perf_counter() - start
        return True

    def _tell(self, label: str, task: str, within: float, beside: int = 1) -> None:
        """Report progress; `beside` pairs are in work together, all of them `within` done."""
        finished = len(self.results) + len(self.errors)
        total = len(self.plans) * len(self.tasks)
        self.progress(Progress(label, task, finished, total, min(within * beside, total - finished)))

    def _engine(self, plan: Plan) -> Engine:
        from trimtab.engine.engine import Engine

        return Engine.from_plan(plan, model=self._model(plan))

    def _model(self, plan: Plan) -> Model:
        if self.model is not None and not isinstance(self.model, (str, Path)):
            return self.model
        key = (plan.model, plan.adapter, plan.dtype, plan.device)
        if key not in self.models:
            from trimtab.models.checkpoint import load

            dtype = None if plan.dtype == "auto" else plan.dtype
            device = {} if plan.device == "auto" else {"device": plan.device}
            self.models[key] = load(plan.model, dtype=dtype, adapter=plan.adapter, **device)
        return self.models[key]

    def rows(self) -> list[Row]:
        first = next(iter(self.plans))
        rows = []
        for label in self.plans:
            for name, task in self.tasks.items():
                key = (label, name)
                result, reference = self.results.get(key), self.results.get((first, name))
                metrics: dict[str, Metric] = dict(result.metrics) if result else {}
                if result and reference and label != first:
                    metrics |= task.relate(result, reference)
                rows.append(
                    Row(
                        plan=label,
                        task=name,
                        metrics=metrics,
                        detail=dict(result.detail) if result else {},
                        notes=result.notes if result else (),
                        error=self.errors.get(key),
                        seconds=self.seconds.get(key, 0.0),
                    )
                )
        return rows

    def report(self, chosen: Sequence[MethodChoice]) -> Report:
        plans = [
            PlanInfo(label, plan.to_dict(), self.backends.get(label), KV_CACHES.get(plan.cache.name).card)
            for label, plan in self.plans.items()
        ]
        tasks = [TaskInfo(str(c), c.name, c.to_dict()["options"], TASKS.get(c.name).card) for c in chosen]
        return Report(plans, tasks, self.rows(), self._describe_models(), provenance(self.seed))

    def _describe_models(self) -> list[dict[str, Any]]:
        """What is known of every model that was measured."""
        handed_in = self.model if self.model is not None and not isinstance(self.model, (str, Path)) else None
        return [describe_model(m) for m in ([handed_in] if handed_in else self.models.values())]


def describe_model(model: Model) -> dict[str, Any]:
    """A model's name, sizes and number type as plain values."""
    from trimtab.models.costs import kv_bytes_per_token, num_parameters

    config, dtype = model.config, next(model.parameters()).dtype
    return {
        "name": model.path.name if model.path is not None else "in memory",
        "architecture": config.architecture,
        "parameters": num_parameters(config),
        "layers": config.num_layers,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "context": config.context_length,
        "dtype": str(dtype).removeprefix("torch."),
        "kv_bytes_per_token": kv_bytes_per_token(config, dtype.itemsize),
    }
