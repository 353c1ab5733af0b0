"""The constraint seam: what a request asks of its text's form, and what decoding asks of a constraint.

`StructuredOutputs` is the wish, a `Constraint` is that wish compiled for one tokenizer (shared by all
requests that have it), and a `ConstraintState` is one text's way through it. Rows are not requests: a state
can be rolled back over tentative tokens and forked where a tree of drafts branches.
"""

from __future__ import annotations

import dataclasses
import json as json_library
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import RequestError, did_you_mean

Mask = NDArray[np.int32]  # [ceil(V / 32)]: bit i % 32 of word i // 32 says whether token i may come next
KINDS = ("json", "json_object", "regex", "grammar", "choice")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """The form a text must have, with vLLM's field names; exactly one of the first five.

    Attributes:
        json: a JSON schema (mapping, or its text).
        json_object: any JSON object.
        regex: a regular expression that the whole text matches.
        grammar: a context-free grammar in llguidance's form of Lark, whose rule is `start`.
        choice: the text is one of these.
        disable_any_whitespace: JSON without optional white space.

    Raises RequestError that names the field.
    """

    json: Any = None
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise RequestError(f"structured_outputs needs exactly one of {', '.join(KINDS)}; found {found}")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(f"structured_outputs.{name} is {value!r}; it must be a text")
        for name in ("json_object", "disable_any_whitespace"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise RequestError(f"structured_outputs.{name} is {value!r}; it must be true or false")
        if self.choice is not None:
            choices = self.choice
            if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
                raise RequestError(f"structured_outputs.choice is {choices!r}; it must be a list of texts")
            if not all(isinstance(c, str) and c for c in choices):
                raise RequestError("structured_outputs.choice holds something else than non-empty texts")
            object.__setattr__(self, "choice", tuple(dict.fromkeys(choices)))
        if self.json is not None:
            object.__setattr__(self, "json", self._schema())

    @classmethod
    def of(cls, value: StructuredOutputs | Mapping[str, Any]) -> StructuredOutputs:
        """From a mapping with these fields; unknown ones are refused by name."""
        if isinstance(value, StructuredOutputs):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"structured_outputs is {value!r}; it must be an object")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                raise RequestError(
                    f"structured_outputs has no field {name!r}.{did_you_mean(str(name), known)}"
                )
        return cls(**value)

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def key(self) -> str:
        """Equal for equal wishes, also where schemas are equal as JSON; the order of properties counts."""
        value = {name: getattr(self, name) for name in (*KINDS, "disable_any_whitespace")}
        return json_library.dumps(value)

    def _schema(self) -> Any:
        schema = self.json
        if isinstance(schema, str | bytes):
            try:
                schema = json_library.loads(schema)
            except ValueError as error:
                raise RequestError(f"structured_outputs.json is not valid JSON: {error}") from None
        if not isinstance(schema, Mapping | bool):
            raise RequestError(f"structured_outputs.json is {schema!r}; a JSON schema is an object")
        return dict(schema) if isinstance(schema, Mapping) else schema


class ConstraintState(ABC):
    """One text's way through a constraint. Not safe for use from two threads at once."""

    @abstractmethod
    def fill_mask(self, out: Mask) -> bool:
        """Write which tokens may come next; False: every token may, and `out` was left alone.

        End tokens are allowed exactly where the text so far is complete. Ids beyond the tokenizer's
        vocabulary are never allowed.
        """

    @classmethod
    def fill_many(cls, states: Sequence[ConstraintState], out: NDArray[np.int32]) -> list[bool]:
        """`fill_mask` for several states of this class, each into its row of `out` [R, ceil(V / 32)]."""
        return [state.fill_mask(row) for state, row in zip(states, out, strict=True)]

    @abstractmethod
    def advance_many(self, tokens: Sequence[int]) -> int:
        """Take tokens as drawn (an end token among them is the last); returns how many were allowed."""

    def advance(self, token: int) -> bool:
        """Take one token; False if it was not allowed."""
        return self.advance_many((token,)) == 1

    @abstractmethod
    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""

    @abstractmethod
    def fork(self) -> ConstraintState:
        """A state of its own at the same place."""

    @abstractmethod
    def forced_tokens(self) -> list[int]:
        """Tokens that are the only ones allowed from here on, in order; often none. Takes none of them."""

    @property
    @abstractmethod
    def accepting(self) -> bool:
        """Whether the text may end here."""

    @property
    @abstractmethod
    def stopped(self) -> bool:
        """Whether nothing but an end token may follow (also after an end token)."""

    @property
    @abstractmethod
    def error(self) -> str | None:
        """Why this state can no longer be used (a limit of the parser was met, say); None while it can."""


class Constraint(ABC):
    """A wish compiled for one tokenizer. Immutable; any number of texts may be under way at once.

    Attributes:
        exact: the mask allows exactly the texts that were asked for. Where it allows more, `check` decides
            at the text's end.
        notes: what a user should know of how it is kept, one sentence each.
    """

    exact: bool = True
    notes: tuple[str, ...] = ()

    @abstractmethod
    def start(self) -> ConstraintState:
        """A fresh state at the text's beginning."""

    def check(self, text: str) -> str | None:
        """Why a finished text is not what was asked for; None when it is."""
        return None
