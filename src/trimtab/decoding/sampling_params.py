"""What a request asks of decoding, with vLLM's field names; wrong values are refused on construction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeGuard

from trimtab.decoding.constraints.base import StructuredOutputs
from trimtab.errors import RequestError

MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to pick tokens and when to stop.

    Attributes:
        n: how many completions to return.
        best_of: how many to make; the `n` likeliest are returned. Default: `n`.
        max_tokens: most tokens to generate; None: until the context is full.
        min_tokens: before that many tokens, no end token and no `stop_token_ids` token is drawn.
        temperature: 0 takes the likeliest token always; 1 is the model's own distribution.
        top_p: keep the likeliest tokens that together hold this probability.
        top_k: keep this many likeliest tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        stop: texts that end the completion. `include_stop_str_in_output` keeps the text that was met.
        stop_token_ids: token ids that end the completion, besides the model's own.
        ignore_eos: go on after the model's end tokens.
        seed: same seed, same tokens, whatever else runs. Any whole number; None: a fresh one each time.
        logprobs: None, or how many of the likeliest tokens to report beside the chosen one (0 to 20).
            They are the model's own log-probabilities, before temperature, penalties and masks.
        prompt_logprobs: the same for the prompt's tokens.
        logit_bias: added to the logits of these token ids, -100 to 100.
        presence_penalty: subtracted from the logit of every token generated so far, -2 to 2.
        frequency_penalty: the same, times how often it was generated, -2 to 2.
        repetition_penalty: logits of tokens in prompt or output are divided (positive ones) or multiplied
            (negative ones) by it, 0.01 to 100; 1 is off.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: the form the text must have: a `StructuredOutputs` or a mapping with its fields.
            Cannot be combined with `stop` and `stop_token_ids`, which could cut it short.

    Raises RequestError that names the field, the value and what is allowed.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: str | Sequence[str] | None = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    # Facts the sampler asks for at every token, worked out once.
    has_penalties: bool = field(init=False, repr=False, compare=False)
    is_plain_greedy: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._whole("n", low=1)
        self._whole("best_of", low=1, optional=True)
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(
                f"best_of is {self.best_of} but n is {self.n}; best_of must be at least n, or be left out"
            )
        self._whole("max_tokens", low=1, optional=True)
        self._whole("min_tokens", low=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens} but max_tokens is {self.max_tokens}; it must not be larger"
            )
        self._number("temperature", low=0.0)
        self._number("top_p", low=0.0, high=1.0, above_low=True)
        self._whole("top_k", low=-1)
        self._number("min_p", low=0.0, high=1.0)
        self._whole("seed", optional=True)
        self._whole("logprobs", low=0, high=MAX_LOGPROBS, optional=True)
        self._whole("prompt_logprobs", low=0, high=MAX_LOGPROBS, optional=True)
        self._number("presence_penalty", low=-2.0, high=2.0)
        self._number("frequency_penalty", low=-2.0, high=2.0)
        # Beyond these a penalised logit leaves the range of numbers.
        self._number("repetition_penalty", low=0.01, high=100.0)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        self._set("stop", self._stop_strings())
        self._set("stop_token_ids", self._stop_ids())
        self._set("logit_bias", self._biases())
        if self.structured_outputs is not None:
            self._set("structured_outputs", StructuredOutputs.of(self.structured_outputs))
            for name in ("stop", "stop_token_ids"):
                if getattr(self, name):
                    raise RequestError(
                        f"{name} cannot be combined with structured_outputs, whose text it could cut short; "
                        "leave one of them out"
                    )
        self._set(
            "has_penalties",
            self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1,
        )
        self._set(
            "is_plain_greedy",
            self.is_greedy and not self.has_penalties and not self.logit_bias and self.logprobs is None,
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def num_samples(self) -> int:
        """How many completions are generated: `best_of`, or `n` without it."""
        return self.n if self.best_of is None else self.best_of

    def check(self, vocab_size: int) -> None:
        """Raise RequestError if `logit_bias` or `stop_token_ids` name a token the model does not have."""
        named = {"logit_bias": self.logit_bias or (), "stop_token_ids": self.stop_token_ids or ()}
        for name, ids in named.items():
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{name} names token id {token}; the model's token ids are 0 to {vocab_size - 1}"
                    )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _whole(
        self, name: str, low: int | None = None, high: int | None = None, optional: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_whole(value) or (low is not None and value < low) or (high is not None and value > high):
            bounds = "" if low is None else f" of at least {low}"
            bounds = bounds if high is None else f" from {low} to {high}"
            none = ", or None" if optional else ""
            raise RequestError(f"{name} is {value!r}; it must be a whole number{bounds}{none}")
        self._set(name, int(value))

    def _number(self, name: str, low: float, high: float | None = None, above_low: bool = False) -> None:
        value = getattr(self, name)
        number = _as_number(value)
        too_low = number is not None and (number <= low if above_low else number < low)
        if number is None or too_low or (high is not None and number > high):
            lower = f"above {low:g}" if above_low else f"at least {low:g}"
            upper = "" if high is None else f" and at most {high:g}"
            raise RequestError(f"{name} is {value!r}; it must be a number, {lower}{upper}")
        self._set(name, number)

    def _stop_strings(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop if self.stop is not None else ()
        if not isinstance(stops, Sequence) or not all(isinstance(s, str) for s in stops):
            raise RequestError(f"stop is {self.stop!r}; it must be a text or a list of texts")
        if "" in stops:
            raise RequestError("stop holds an empty text, which would end every completion at once")
        return tuple(dict.fromkeys(stops))

    def _stop_ids(self) -> tuple[int, ...]:
        ids = self.stop_token_ids if self.stop_token_ids is not None else ()
        if isinstance(ids, str | Mapping) or not isinstance(ids, Sequence | set | frozenset):
            raise RequestError(f"stop_token_ids is {ids!r}; it must be a list of token ids")
        if not all(_is_whole(i) and i >= 0 for i in ids):
            raise RequestError(f"stop_token_ids is {ids!r}; token ids are whole numbers of at least 0")
        return tuple(int(i) for i in ids)

    def _biases(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        biases = {}
        for key, value in self.logit_bias.items():
            # JSON knows only text keys.
            token = int(key) if isinstance(key, str) and key.isdecimal() else key
            if not _is_whole(token) or token < 0:
                raise RequestError(f"logit_bias has the key {key!r}; keys must be token ids")
            bias = _as_number(value)
            if bias is None or not -100 <= bias <= 100:
                raise RequestError(
                    f"logit_bias of token {token} is {value!r}; it must be a number from -100 to 100"
                )
            biases[int(token)] = bias
        return biases


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _as_number(value: Any) -> float | None:
    """`value` as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number = float(value)
    return number if math.isfinite(number) else None
