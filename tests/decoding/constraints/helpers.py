"""What the tests of constraints share: compiled wishes, masks as lists, and random walks under masks."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from typing import Any

import numpy as np

from evaluation.fakes import shipped_tokenizer
from trimtab.decoding.constraints.base import Constraint, ConstraintState, StructuredOutputs
from trimtab.decoding.constraints.compiler import Compiler

VOCAB = 4130  # wider than the tokenizer's 4096, as padded output heads are


@lru_cache(maxsize=1)
def compiler() -> Compiler:
    tokenizer = shipped_tokenizer()
    return Compiler(tokenizer, VOCAB, tokenizer.eos_ids)


def constraint(**wish: Any) -> Constraint:
    return compiler().compile(StructuredOutputs(**wish), timeout_s=60)


def allowed(state: ConstraintState, vocab: int = VOCAB) -> list[int]:
    """Ids that the mask allows, ascending."""
    mask = np.full(-(-vocab // 32), -1, np.int32)
    assert state.fill_mask(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def ids(text: str) -> list[int]:
    return shipped_tokenizer().encode(text, add_special_tokens=False)


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether the text is allowed token by token, may end there, and passes the check."""
    state, tokens = constraint.start(), ids(text)
    return state.advance_many(tokens) == len(tokens) and state.accepting and constraint.check(text) is None


def walk(constraint: Constraint, seed: int, most: int = 400) -> str | None:
    """A text of uniformly drawn allowed tokens that ended; None if it got too long, or into a dead end.

    Ends as soon as it may after half of `most` tokens, and then prefers tokens that close something.
    """
    rng, state, tokens = random.Random(seed), constraint.start(), []
    tokenizer = shipped_tokenizer()
    for step in range(most):
        choices = allowed(state)
        ends = [token for token in choices if token in tokenizer.eos_ids]
        if not choices:
            assert state.error is not None, "no token is allowed"
            return None
        assert bool(ends) == state.accepting, "an end token is allowed exactly where the text is complete"
        if ends and (len(ends) == len(choices) or step > most // 2 or rng.random() < 0.05):
            assert state.advance(ends[0]) and state.stopped
            return tokenizer.decode(tokens)
        choices = [token for token in choices if token not in ends]
        assert not set(choices) & tokenizer.special_ids
        if step > most // 4:
            closing = [t for t in choices if set(tokenizer.decode([t])) & set('"}]')]
            choices = closing or choices
        token = rng.choice(choices)
        assert state.advance(token)
        tokens.append(token)
    return None


def dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
