"""Where the microseconds of our step go: every part's own time, without that of the parts it calls."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

from _common import Table

from trimtab import Engine

_NATIVE = ("step", "embed", "layer_in", "layer_out", "finish")
_STEP = "step: the loop itself"
_TOP = "outside steps (request, output)"


class Profile:
    """Times the parts of one engine while entered; the engine is as before afterwards.

    Means add up to the whole; medians show the usual step, without the prompt's and without those that a
    neighbour disturbed. A timer costs about 0.3 us a call, which falls to the part that calls it.
    """

    def __init__(self, engine: Engine) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.engine = engine
        self._each: list[dict[str, float]] = []  # seconds of all parts, step by step
        self._undo: list[Callable[[], None]] = []
        self._open: list[str] = []
        self._since = 0.0

    def _parts(self) -> list[tuple[Any, str, str]]:
        """(owner, method, label) of everything timed. A part that an engine lacks is its caller's time."""
        names = {
            "step": _STEP,
            "scheduler.schedule": "schedule",
            "runner.run": "assemble rows",
            "runner._cos_sin": "rotary table",
            "model.run": "model in torch",
            "cache.begin": "cache: begin",
            "cache.attend": "cache: attend, Python side",
            "cache.commit": "cache: commit",
            "cache.publish_prefix": "cache: publish prefix",
            "outcomes.wanted": "choose logits",
            "outcomes.use": "logits to rows",
            "outcomes._sampler.sample": "sample",
            "outcomes._append": "append, stop, detokenise",
            **{f"runner.native.{name}": "set up the C++ call" for name in _NATIVE},
        }
        found = []
        for path, label in names.items():
            *owners, name = path.split(".")
            owner: Any = self.engine
            for step in owners:
                owner = getattr(owner, step, None)
            if hasattr(owner, name):
                found.append((owner, name, label))
        native = self.engine.runner.native
        if native is not None:
            lib = native.library.lib
            found += [(lib, name, "C++ kernels") for name in vars(lib) if name.startswith("tt_")]
        return found

    def __enter__(self) -> Profile:
        for owner, name, label in self._parts():
            self._wrap(owner, name, label)
        self._open, self._since = [_TOP], time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._switch()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _end_step(self, before: dict[str, float]) -> None:
        self._each.append({label: s - before.get(label, 0.0) for label, s in self.seconds.items()})

    def _switch(self) -> None:
        """Book the time since the last switch to the part that ran."""
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _wrap(self, owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)
        own = vars(owner).get(name)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(label)
            self.calls[label] += 1
            before = dict(self.seconds) if label == _STEP else {}
            try:
                return original(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()
                if label == _STEP:
                    self._end_step(before)

        setattr(owner, name, timed)
        self._undo.append(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))

    def record(self) -> dict[str, dict[str, float]]:
        """Microseconds a step of each part: `mean` and `median`."""
        steps = len(self._each)
        return {
            label: {
                "mean": seconds / steps * 1e6,
                "median": statistics.median(step.get(label, 0.0) for step in self._each) * 1e6,
                "calls": self.calls[label] / steps,
            }
            for label, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])
        }

    def table(self, title: str) -> Table:
        table = Table(title, ["part", "us a step, median", "mean", "share of mean", "calls a step"])
        parts = self.record()
        total = sum(part["mean"] for part in parts.values())
        for label, part in parts.items():
            table.add(
                label,
                f"{part['median']:.1f}",
                f"{part['mean']:.1f}",
                f"{part['mean'] / total:.1%}",
                f"{part['calls']:.1f}",
            )
        whole = statistics.median(sum(step.values()) for step in self._each) * 1e6
        table.add("all", f"{whole:.1f}", f"{total:.1f}", "100.0%", "")
        return table
