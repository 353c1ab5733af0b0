"""Which settings may differ between a checkpoint and the recipe that goes on from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import ConfigError
from trimtab.training.keeping.folder import write_whole
from trimtab.training.recipe import Recipe

# None of these changes what a step computes; `tokens` only says how many there are.
FREE = (
    "output",
    "tokens",
    "cache",
    "validation",
    "samples",
    "activation_checkpointing",
    "checkpoint_minutes",
    "keep_checkpoints",
    "log_seconds",
    "tensorboard",
    "save_dtype",
)

# Settings whose keys the recipe's own classes do not list: a new key was left out then.
_OPEN = ("mixture", "objective", "lora", "model.config")


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Every setting as plain JSON values."""
    raw = dataclasses.asdict(recipe)
    for name in ("where", "folder"):
        del raw[name]
    return json.loads(json.dumps(raw, default=str))


def write_settings(path: Path, recipe: Recipe) -> None:
    """The recipe with every default written out."""
    head = f"# Every setting of this run. Relative paths begin at {recipe.folder.resolve()}\n"
    write_whole(path, head + yaml.safe_dump(settings_of(recipe), sort_keys=False, allow_unicode=True))


def check_same(then: dict[str, Any], recipe: Recipe) -> None:
    """ConfigError that names a setting of `recipe` that may not differ from `then`, the run's."""
    now = settings_of(recipe)
    for key in then:
        if key in FREE or key not in now:
            continue
        for name, before, after in _differences(then[key], now[key], key):
            raise ConfigError(
                f"{name!r} of {recipe.where} is {after!r}, and was {before!r} in the run to be resumed; "
                "set it back, or begin a new run in another output folder"
            )


def _differences(then: Any, now: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value then, value now) of what differs; a setting that did not exist then does not."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in then:
            yield from _differences(then[key], now.get(key), f"{name}.{key}")
        for key in set(now) - set(then):
            if now[key] is not None and name.startswith(_OPEN):
                yield f"{name}.{key}", None, now[key]
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from _differences(a, b, f"{name}.{i}")
    elif then != now:
        yield name, then, now
