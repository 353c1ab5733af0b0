"""llguidance behind the constraint seam: masks from a parser that walks the vocabulary's trie.

A grammar (JSON schema, regular expression or Lark) and a tokenizer give a matcher; matchers are cheap to copy
and to roll back, and a mask takes some microseconds. Where the grammar forces text, the mask holds the
canonical token alone. Source: https://github.com/guidance-ai/llguidance (MIT).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from trimtab.decoding.constraints.base import Constraint, ConstraintState, Mask
from trimtab.errors import RequestError
from trimtab.models.tokenizer import Tokenizer, decoder_steps

Grammar = str  # JSON text that llguidance reads
BROKEN = "the grammar met a limit or a dead end of its parser; simplify the schema, pattern or grammar"


@lru_cache(maxsize=1)
def limits() -> LLParserLimits:
    """Bounds that turn hostile grammars into errors: some 20 ms to begin, some 15 ms and 50 MB on the way."""
    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def read_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> LLTokenizer:
    """llguidance's view of a checkpoint's tokenizer, byte-level or with byte fallback.

    `vocab_size`: width of the model's logits; ids that the tokenizer does not have stand for nothing and are
    never allowed, special tokens only where a grammar names them. Raises RequestError.
    """
    if not eos_ids:
        raise RequestError(
            "this model names no end token, so a text of a given form could not end; "
            "set eos_token_id in its generation_config.json"
        )
    text = tokenizer.backend.to_str()
    try:
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=sorted(eos_ids))
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"structured outputs cannot use this model's tokenizer: {error}") from None


def strips_a_space(tokenizer: Tokenizer) -> bool:
    """Whether the text of tokens loses its first space (SentencePiece: `▁{` at the beginning reads `{`)."""
    steps = decoder_steps(tokenizer) or []
    return any(step["type"] == "Strip" and step.get("start", 0) > 0 for step in steps)


def match(grammar: Grammar, tokenizer: LLTokenizer) -> tuple[LLMatcher, str]:
    """A matcher at the beginning, and what is wrong with the grammar ("" if nothing)."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    return matcher, matcher.get_error()


class GuidanceConstraint(Constraint):
    """A grammar compiled for one tokenizer, and how a finished text is checked where the mask is too wide.

    Attributes:
        rung: "exact", or of a JSON schema "relaxed" (the mask leaves keywords out) or "generic" (any JSON).
    """

    def __init__(
        self,
        matcher: LLMatcher,
        eos_ids: frozenset[int],
        *,
        check: Callable[[str], str | None] | None = None,
        notes: Sequence[str] = (),
        rung: str = "exact",
    ) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._check = check
        self._copying = threading.Lock()
        self.exact = check is None
        self.notes = tuple(notes)
        self.rung = rung

    def warm(self, vocab_size: int) -> None:
        """Make the first mask, of which all texts then start with what the parser has learnt of it."""
        words = np.zeros(-(-vocab_size // 32), np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            raise RequestError(f"structured_outputs: {BROKEN} ({first_line(self._matcher.get_error())})")

    def start(self) -> ConstraintState:
        with self._copying:
            return GuidanceState(self._matcher.deep_copy(), self._eos_ids)

    def check(self, text: str) -> str | None:
        return None if self._check is None else self._check(text)


class GuidanceState(ConstraintState):
    """One matcher, and whether an end token was taken (which llguidance is never told of)."""

    __slots__ = ("_ended", "_eos_ids", "_matcher")

    def __init__(self, matcher: LLMatcher, eos_ids: frozenset[int], ended: bool = False) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._ended = ended

    def fill_mask(self, out: Mask) -> bool:
        if self._ended:
            self._only_the_end(out)
            return True
        # The parser writes words itself; anything else than a row of int32 would be written past its end.
        if out.dtype != np.int32 or not out.flags.c_contiguous:
            raise ValueError(f"a mask is a contiguous row of int32, not {out.dtype} {out.strides}")
        self._fill(out, out.__array_interface__["data"][0], out.nbytes)
        return True

    def _fill(self, out: Mask, address: int, size: int) -> None:
        """Write the mask to `address`, where `out` lies."""
        if self._ended:
            self._only_the_end(out)
            return
        self._matcher.unsafe_compute_mask_ptr(address, size)
        if self._matcher.is_error():  # then the parser allows the end, as if the text were complete
            out[:] = 0

    def _only_the_end(self, out: Mask) -> None:
        out[:] = 0
        words = out.view(np.uint32)
        for token in self._eos_ids:
            words[token >> 5] |= np.uint32(1 << (token & 31))

    @classmethod
    def fill_many(cls, states: Sequence[ConstraintState], out: NDArray[np.int32]) -> list[bool]:
        return fill_masks(states, out)

    def advance_many(self, tokens: Sequence[int]) -> int:
        if self._ended:
            return 0
        end = next((i for i, token in enumerate(tokens) if token in self._eos_ids), None)
        taken = self._matcher.try_consume_tokens(list(tokens if end is None else tokens[:end]))
        if taken == end and self.accepting:
            self._ended = True
            return taken + 1
        return taken

    def advance(self, token: int) -> bool:
        if not self._ended and token not in self._eos_ids:
            return self._matcher.try_consume_tokens([token]) == 1
        return self.advance_many((token,)) == 1

    def rollback(self, count: int) -> None:
        if count < 0:
            raise ValueError(f"cannot take back {count} tokens")
        if self._ended and count:
            self._ended = False
            count -= 1
        if count and not self._matcher.rollback(count):
            raise ValueError(f"cannot take back {count} tokens: {self._matcher.get_error()}")

    def fork(self) -> GuidanceState:
        return GuidanceState(self._matcher.deep_copy(), self._eos_ids, self._ended)

    def forced_tokens(self) -> list[int]:
        forced = [] if self._ended else self._matcher.compute_ff_tokens()
        if not forced:
            return []
        # A text's last token is left to be drawn, as every text's is, so that it ends in one way only.
        taken = self._matcher.try_consume_tokens(forced)
        ends = self._matcher.is_stopped()
        self._matcher.rollback(taken)
        return forced[:-1] if ends else forced

    @property
    def accepting(self) -> bool:
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def stopped(self) -> bool:
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def error(self) -> str | None:
        if not self._matcher.is_error():
            return None
        return f"{BROKEN} ({first_line(self._matcher.get_error())})"


def fill_masks(states: Sequence[ConstraintState], out: NDArray[np.int32]) -> list[bool]:
    """`fill_mask` of many states, state i into row i of `out` `[R, ceil(V / 32)]`.

    A loop: llguidance's own thread pool is slower than it up to 64 rows, since most masks take less time
    than a thread takes to wake.
    """
    if out.dtype != np.int32 or not out.flags.c_contiguous:
        raise ValueError(f"masks are contiguous rows of int32, not {out.dtype} {out.strides}")
    if len(states) > len(out):
        raise ValueError(f"{len(states)} states do not fit into {len(out)} rows")
    address, size = out.__array_interface__["data"][0], out.strides[0]
    filled = []
    for row, state in enumerate(states):
        if isinstance(state, GuidanceState):
            state._fill(out[row], address + row * size, size)
            filled.append(True)
        else:
            filled.append(state.fill_mask(out[row]))
    return filled


def first_line(message: str) -> str:
    """What an error of llguidance says, on one line and without the grammar's text."""
    message = message.split("<state>")[0]
    if "error: " in message:  # of a regular expression, after a drawing of where it is
        message = message.rsplit("error: ", 1)[1]
    shown = re.sub(r"^\s*\d* \|.*$", "", message, flags=re.MULTILINE)
    shown = re.sub(r"\s+", " ", shown).strip(" ^")
    return shown if len(shown) <= 300 else shown[:297] + "..."
