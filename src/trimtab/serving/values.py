"""How a setting's value is written, and the sentence for one that does not fit.

Each parser also takes what it gives, so that settings can be made from values of either form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from trimtab.errors import ConfigError, did_you_mean
from trimtab.plan import Plan

TOOL_FORMATS = (
    "auto",
    "generic",
    "hermes",
    "llama3",
    "mistral",
)  # as in tools/formats.py, which imports much


def seconds(value: Any, what: str) -> float:
    """Seconds from a number, `"20ms"`, `"1.5s"` or `"2min"`."""
    units = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", str(value))
    if isinstance(value, bool) or match is None or match[2] not in units:
        raise ConfigError(f"{what} is {value!r}; write seconds, or for example '20ms', '30s' or '2min'")
    return float(match[1]) * units[match[2]]


def seconds_or_none(value: Any, what: str) -> float | None:
    if value is None or value == "none":
        return None
    number = seconds(value, what)
    if not number:
        raise ConfigError(f"{what} is {value!r}; give more than zero seconds, or 'none' for no bound")
    return number


def seconds_or_auto(value: Any, what: str) -> float | None:
    return None if value is None or value == "auto" else seconds(value, what)


def count(least: int, most: float = math.inf) -> Callable[[Any, str], int]:
    bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def parse(value: Any, what: str) -> int:
        text = str(value).strip()
        if isinstance(value, bool) or not re.fullmatch(r"-?\d+", text) or not least <= int(text) <= most:
            raise ConfigError(f"{what} is {value!r}; it must be a whole number {bounds}")
        return int(text)

    return parse


def flag(value: Any, what: str) -> bool:
    word = str(value).strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ConfigError(f"{what} is {value!r}; it must be true or false")


def text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ConfigError(f"{what} is {value!r}; it must be a text of printable characters")
    return value.strip()


def text_or_none(value: Any, what: str) -> str | None:
    return None if value is None or value == "none" else text(value, what)


def tool_format(value: Any, what: str) -> str:
    if value not in TOOL_FORMATS:
        known = did_you_mean(str(value), TOOL_FORMATS, len(TOOL_FORMATS))
        raise ConfigError(f"{what} is {value!r}, which is no tool format.{known}")
    return value


def root_path(value: Any, what: str) -> str:
    if value == "":
        return ""
    path = text(value, what)
    if not re.fullmatch(r"(/[^/?#\s]+)+", path):
        raise ConfigError(f"{what} is {value!r}; write a path such as '/llm', without a slash at its end")
    return path


def key(value: Any, what: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(f"{what} has a key that is empty or has blanks or signs outside ASCII in it")
    return value


def origin(value: Any, what: str) -> str:
    if value != "*" and not re.fullmatch(r"https?://[^/,;\s*]+", str(value)):
        raise ConfigError(f"{what} is {value!r}; write an origin such as 'https://chat.example.org', or '*'")
    return str(value)


def each(parse: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    def all_of(value: Any, what: str) -> tuple[Any, ...]:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(parse(item, what) for item in items)

    return all_of


def plan(value: Any, what: str) -> Plan:
    if not isinstance(value, Plan | str | Mapping):
        raise ConfigError(f"{what} has {value!r}; write a plan such as 'cache=kivi:bits=2'")
    return Plan.of(value)
