"""A latency bound (service-level objective) that a good request keeps, and durations as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.errors import ConfigError, did_you_mean

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0}
MEANINGS = {
    "ttft": "time to first token",
    "tpot": "mean time per output token after the first",
    "itl": "99th percentile of the request's own gaps between chunks",
    "e2e": "time to the last token",
}


def parse_duration(text: str, what: str) -> float:
    """Seconds from `"200ms"`, `"1.5s"`, `"2m"` or plain seconds `"30"`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text)
    if match is None or (match[2] or "s") not in UNITS:
        raise ConfigError(f"{what} is {text!r}; write a duration such as '200ms', '1.5s' or '2m'")
    return float(match[1]) * UNITS[match[2] or "s"]


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in seconds by name (see `MEANINGS`); a request is good when it keeps all of them."""

    bounds: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From `"ttft=200ms,itl=50ms"`."""
        bounds: dict[str, float] = {}
        for word in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = word.partition("=")
            if name not in MEANINGS:
                raise ConfigError(f"--slo has no bound {name!r}.{did_you_mean(name, MEANINGS)}")
            bounds[name] = parse_duration(value, f"--slo {name}")
            if bounds[name] <= 0:
                raise ConfigError(f"--slo {name} is {value!r}; it must be more than zero")
        if not bounds:
            raise ConfigError("--slo is empty; write for example 'ttft=200ms,itl=50ms'")
        return cls(tuple(bounds.items()))

    def kept(self, measured: Mapping[str, float | None]) -> bool:
        """Whether `measured` times are within every bound; what is not there (a lone token's gap) is."""
        return all((measured.get(name) or 0.0) <= bound for name, bound in self.bounds)

    def bound(self, name: str) -> float | None:
        return dict(self.bounds).get(name)

    def __str__(self) -> str:
        return ", ".join(f"{name} <= {1e3 * bound:g} ms" for name, bound in self.bounds)
