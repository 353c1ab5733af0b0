"""The errors a user can cause, each one clear sentence that names the setting, the value and the fix.

Two kinds of failure exist in this project. A *user mistake* raises `TrimtabError` or one of its
children; the command line prints its message and exits with code 2, never with a traceback. A *bug*
in trimtab raises `AssertionError` or anything else, and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(ValueError):
    """A mistake in what the user asked for or handed in."""


class ConfigError(TrimtabError):
    """An unknown, missing or ill-typed setting."""


class PlanError(TrimtabError):
    """A combination of choices that cannot work; `reasons` lists all of them."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = list(reasons)
        if len(self.reasons) == 1:
            message = f"this plan cannot run: {self.reasons[0]}"
        else:
            listed = "".join(f"\n  - {reason}" for reason in self.reasons)
            message = f"this plan cannot run, for {len(self.reasons)} reasons:{listed}"
        super().__init__(message)


class CheckpointError(TrimtabError):
    """A model folder that is missing, broken, or means something we do not implement."""


class RequestError(TrimtabError):
    """A generation request that cannot be served (too long, empty, bad sampling values)."""


class NumericsError(TrimtabError):
    """The model produced values that are not numbers."""


class OutputError(TrimtabError):
    """A result could not be written (disk full, no permission)."""


def did_you_mean(word: str, known: Iterable[str], n: int = 3) -> str:
    """`" Did you mean 'a' or 'b'?"` for the nearest known words, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=n, cutoff=0.5)
    if near:
        return " Did you mean " + " or ".join(repr(w) for w in near) + "?"
    return f" Known: {', '.join(known)}." if known else ""
