"""Where the microseconds of our step go: every part's own time, without that of the parts it calls."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

from _common import Table

from trimtab import Engine

_NATIVE = ("step", "embed", "layer_in", "layer_out", "finish")
_TOP = "outside steps (request, output)"


class Profile:
    """Times the parts of one engine while entered; the engine is as before afterwards.

    A timer costs about 0.3 us a call, which falls to the part that calls it.
    """

    def __init__(self, engine: Engine) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.engine = engine
        self._undo: list[Callable[[], None]] = []
        self._open: list[str] = []
        self._since = 0.0

    def _parts(self) -> list[tuple[Any, str, str]]:
        """(owner, method, label) of everything timed. A part that an engine lacks is its caller's time."""
        names = {
            "step": "step: the loop itself",
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
            try:
                return original(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        setattr(owner, name, timed)
        self._undo.append(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))

    def table(self, title: str, steps: int) -> Table:
        table = Table(title, ["part", "us a step", "share", "calls a step"])
        total = sum(self.seconds.values())
        for label, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            table.add(
                label,
                f"{seconds / steps * 1e6:.1f}",
                f"{seconds / total:.1%}",
                f"{self.calls[label] / steps:.1f}",
            )
        table.add("all", f"{total / steps * 1e6:.1f}", "100.0%", "")
        return table

    def record(self, steps: int) -> dict[str, float]:
        """Microseconds a step of each part."""
        return {label: seconds / steps * 1e6 for label, seconds in self.seconds.items()}
