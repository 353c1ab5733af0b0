"""Strict reading of a JSON object: every value is typed, and every key that nobody read can be listed.

`config.json` decides the numbers a model produces, so a key that we do not understand must not be passed
over. `Fields` remembers which keys were read; the caller compares that with what it knows to be harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.errors import CheckpointError

_REQUIRED: Any = object()


class Fields:
    """Typed access to `raw`; `where` names the file in error messages. A null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.raw = raw
        self.where = where
        self.defaults = dict(defaults or {})
        self.read: set[str] = set()

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`; absent or null gives the family's default, then `default`, then an error."""
        self.read.add(key)
        found = self.raw.get(key)
        if found is None and key not in self.raw:
            found = self.defaults.get(key)
        if found is not None:
            return found
        if default is _REQUIRED:
            raise CheckpointError(f"{self.where} has no field {key!r}, which this model needs")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 1) -> Any:
        """A whole number of at least `minimum`."""
        found = self.value(key, default)
        if found is None:
            return None
        whole = isinstance(found, int) or (isinstance(found, float) and found.is_integer())
        if isinstance(found, bool) or not whole or found < minimum:
            raise self.error(key, found, f"a whole number of at least {minimum}")
        return int(found)

    def number(self, key: str, default: Any = _REQUIRED, above: float = 0.0) -> Any:
        """A finite number greater than `above`."""
        found = self.value(key, default)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not above < found < float("inf"):
            raise self.error(key, found, f"a number above {above:g}")
        return float(found)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        found = self.value(key, default)
        if not isinstance(found, bool):
            raise self.error(key, found, "true or false")
        return found

    def demand(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Refuse `key` unless its value is one of `allowed`: any other would change the numbers."""
        found = self.value(key, default)
        if found not in allowed:
            listed = " or ".join(repr(a) for a in allowed)
            raise CheckpointError(
                f"{self.where} sets {key!r} to {found!r}, which trimtab does not implement (only {listed})"
            )

    def error(self, key: str, found: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where} sets {key!r} to {found!r}; it must be {wanted}")

    def unread(self) -> list[str]:
        """The keys present that nobody asked for, sorted."""
        return sorted(set(self.raw) - self.read)
