"""One lazy registry a seam: a method registers by being one file in its seam's folder.

Rule: every module in the folder except `base.py` is a method and carries the method's name; shared
machinery lives in sub-packages. So names are known without importing anything, and a method's module
(and torch with it) is imported when the method is first used. Other packages add methods through the
entry-point group `trimtab.<seam>`.

A module registers its class so:

    @KV_CACHES.add(options=KiviOptions, card=Card(title="KIVI", ...))
    class Kivi(KVCache): ...
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from trimtab.errors import ConfigError, did_you_mean

T = TypeVar("T", bound=type)


@dataclass(frozen=True, slots=True)
class Card:
    """What `trimtab explain METHOD` prints. Every field is one or two plain sentences."""

    title: str
    idea: str
    exactness: str  # what is exact, what is approximate, what deviates from the paper
    cost: str  # bytes, extra compute, extra host work
    needs: str  # what it asks of model and engine
    avoid_when: str
    paper: str = ""  # authors, title, year
    arxiv: str = ""
    measured: str = ""  # one measured row, hardware named


@dataclass(frozen=True, slots=True)
class NoOptions:
    """A method without settings."""


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    seam: str
    cls: type
    options: type
    card: Card


@dataclass
class Registry:
    """The methods of one seam. `package` is the folder, e.g. `trimtab.kvcache`."""

    seam: str
    package: str
    question: str
    _methods: dict[str, Method] = field(default_factory=dict)

    @cached_property
    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {e.name: e for e in importlib.metadata.entry_points(group=f"trimtab.{self.seam}")}

    def names(self) -> list[str]:
        """All method names, without importing any of them."""
        spec = importlib.util.find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations is not None, self.package
        files = {
            m.name
            for m in pkgutil.iter_modules(spec.submodule_search_locations)
            if not m.ispkg and m.name != "base"
        }
        return sorted(files | set(self._entry_points))

    def add(self, *, card: Card, options: type = NoOptions, name: str | None = None) -> Callable[[T], T]:
        """Class decorator for a method's file; the name defaults to the file's."""

        def register(cls: T) -> T:
            key = name or cls.__module__.rsplit(".", 1)[-1]
            known = self._methods.get(key)
            if known is not None and known.cls.__module__ != cls.__module__:
                raise ConfigError(
                    f"two {self.seam} methods are called {key!r}: {known.cls.__module__} and "
                    f"{cls.__module__}; rename one of them"
                )
            self._methods[key] = Method(key, self.seam, cls, options, card)
            return cls

        return register

    def get(self, name: str) -> Method:
        """The method called `name`; an unknown name is a ConfigError with the nearest names."""
        if name not in self._methods:
            if name not in self.names():
                raise ConfigError(f"unknown {self.seam} method {name!r}.{did_you_mean(name, self.names())}")
            if name in self._entry_points:
                self._entry_points[name].load()
            else:
                importlib.import_module(f"{self.package}.{name}")
        return self._methods[name]

    def build_options(self, name: str, raw: Mapping[str, Any]) -> Any:
        """Typed, checked options of method `name` from strings or plain values."""
        method = self.get(name)
        return build_dataclass(method.options, raw, where=f"{self.seam} method {name!r}")


def build_dataclass(cls: type, raw: Mapping[str, Any], *, where: str) -> Any:
    """Make `cls` from `raw`, converting strings by the fields' types and refusing unknown names."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in raw.items():
        if key not in fields:
            hint = did_you_mean(str(key), fields) if fields else " It has no options."
            raise ConfigError(f"unknown option {key!r} of {where}.{hint}")
        values[key] = _convert(value, hints[key], f"option {key!r} of {where}")
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} needs the option {missing[0]!r}")
    return cls(**values)


def _convert(value: Any, hint: Any, what: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        if type(None) in choices and (value is None or value == "none"):
            return None
        choices = tuple(choice for choice in choices if choice is not type(None))
        if len(choices) == 1:
            return _convert(value, choices[0], what)
        for choice in choices:
            try:
                return _convert(value, choice, what)
            except ConfigError:
                if hasattr(choice, "parse"):  # such a type knows what may be written in its place
                    raise
        raise ConfigError(f"{what} is {value!r}; allowed: {hint}")
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        for choice in allowed:
            if value == choice or str(value) == str(choice):
                return choice
        raise ConfigError(f"{what} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    if origin is tuple:  # tuple[int, ...]: a list is written 256+512+1024
        element = typing.get_args(hint)[0]
        items = value.split("+") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            items = [items]
        return tuple(_convert(item, element, what) for item in items)
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "on", "1"):
            return True
        if str(value).lower() in ("false", "no", "off", "0"):
            return False
        raise ConfigError(f"{what} is {value!r}; it must be true or false")
    if hint is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ConfigError(f"{what} is {value!r}; it must be a whole number")
        try:
            return int(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{what} is {value!r}; it must be a whole number") from None
    if hint is float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{what} is {value!r}; it must be a number") from None
    if origin is collections.abc.Mapping and not isinstance(value, Mapping):
        raise ConfigError(f"{what} is {value!r}; it must be a mapping of names to values")
    if hint is str:
        return str(value)
    if hasattr(hint, "parse"):  # a value type such as a share: written as text, converted by itself
        return value if isinstance(value, hint) else hint.parse(value, what)
    return value


KV_CACHES = Registry(
    "cache", "trimtab.kvcache", "what is remembered of past tokens, where, in how many bits?"
)
WEIGHTS = Registry("weights", "trimtab.compression", "which numbers are stored for a model's matrices?")
CALIBRATIONS = Registry("attachment", "trimtab.calibration", "what is fitted for a base model?")
TASKS = Registry("task", "trimtab.evaluation.tasks", "how is quality measured?")
OBJECTIVES = Registry("objective", "trimtab.training.objectives", "what does a training step minimise?")

SEAMS: dict[str, Registry] = {r.seam: r for r in (KV_CACHES, WEIGHTS, CALIBRATIONS, TASKS, OBJECTIVES)}
