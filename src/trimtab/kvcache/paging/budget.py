"""How many rows a head may keep: a number, or a share of the prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the prompt, written `25%`."""

    percent: float

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ConfigError(f"a share of {self} of the prompt; it must be above 0% and at most 100%")

    @classmethod
    def parse(cls, value: Any, what: str) -> Share:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e-?\d+)?)\s*%\s*", str(value))
        if match is None or not 0 < float(match[1]) <= 100:
            raise ConfigError(f"{what} is {value!r}; write rows such as 256, or a share such as 25%")
        return cls(float(match[1]))

    def __str__(self) -> str:
        return f"{self.percent}".removesuffix(".0") + "%"


@dataclass(frozen=True, slots=True)
class BudgetOptions:
    budget: int | Share = field(
        default=256, metadata={"help": "rows a head keeps, or a share of the prompt (25%)"}
    )
    chunk: int | None = field(
        default=None,
        metadata={"help": "drop rows after every so many prompt tokens; none = at the prompt's end only"},
    )

    def check(self, method: str, protected: int, what: str) -> None:
        """Refuse a budget that `protected` rows (`what` they are) fill, and steps of nothing."""
        if isinstance(self.budget, int) and self.budget <= protected:
            raise ConfigError(
                f"option 'budget' of {method} is {self.budget}; it must be above {what} ({protected})"
            )
        for name in ("chunk", "interval"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ConfigError(f"option {name!r} of {method} is {value}; it must be at least 1, or none")

    def rows(self, tokens: int, protected: int) -> int:
        """Rows a head keeps of `tokens` prompt tokens; of a share at least one more than `protected` ones."""
        if isinstance(self.budget, int):
            return self.budget
        return max(int(tokens * self.budget.percent / 100), protected + 1)
