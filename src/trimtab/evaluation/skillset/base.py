"""What a skill is: a seeded generator of exercises, each with its own check."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass


def same_text(answer: str, reference: str) -> bool:
    """Equal after outer white space is dropped."""
    return answer.strip() == reference.strip()


def unfenced(answer: str) -> str:
    """The first fenced block of a chatty answer, or all of it when nothing is fenced."""
    block = re.search(r"```\w*\n(.*?)```", answer, flags=re.DOTALL)
    return (block[1] if block else answer).strip()


@dataclass(frozen=True, slots=True)
class Exercise:
    """One question with its reference answer.

    `check(answer, reference)` is true for every answer that counts as right.
    """

    question: str
    reference: str
    check: Callable[[str, str], bool] = same_text

    def is_right(self, answer: str) -> bool:
        return self.check(answer, self.reference)


@dataclass(frozen=True, slots=True)
class Skill:
    """A family of exercises.

    `make(rng)` draws one exercise; equal generators of randomness give equal exercises. `max_tokens` is
    room enough for the right answer. `core` skills are those the shipped model has learnt: their mean is
    the headline number, the others are reported but would only add noise to it.
    """

    name: str
    title: str
    make: Callable[[random.Random], Exercise]
    max_tokens: int
    core: bool
