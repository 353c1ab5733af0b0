"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re
from typing import Any

from trimtab.errors import ConfigError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{u}b": 1000**i for i, u in enumerate("kmgt", 1)}
_UNITS |= {f"{u}ib": 1024**i for i, u in enumerate("kmgt", 1)}


def parse_bytes(value: Any, what: str = "a size") -> int:
    """Bytes from an int, `"1024"`, `"512MiB"` (powers of 1024) or `"2GB"` (powers of 1000)."""
    if isinstance(value, int) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(f"{what} is {value!r}; write bytes, or for example '512MiB' or '2GB'")
        number, unit = float(match[1]), match[2].lower()
    size = round(number * _UNITS[unit])
    if size <= 0:
        raise ConfigError(f"{what} is {value!r}; it must be more than zero")
    return size


def format_bytes(size: float) -> str:
    """A size for people, in powers of 1024: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
