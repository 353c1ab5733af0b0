"""What a skill is: a seeded generator of exercises, each with its own check."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.skills.execute import FunctionTests, Verdict, run_function

if TYPE_CHECKING:
    from trimtab.skills.world import World


def same_text(answer: str, reference: str) -> bool:
    """Equal after outer white space is dropped."""
    return answer.strip() == reference.strip()


def same_number(answer: str, reference: str) -> bool:
    """The last whole number of the answer is the reference, so a line of working before it is fine."""
    numbers = re.findall(r"-?\d+", answer)
    return bool(numbers) and int(numbers[-1]) == int(reference)


def unfenced(answer: str) -> str:
    """The first fenced block of a chatty answer, or all of it when nothing is fenced."""
    block = re.search(r"```\w*\n(.*?)```", answer, flags=re.DOTALL)
    return (block[1] if block else answer).strip()


@dataclass(frozen=True, slots=True)
class Exercise:
    """One question with its reference answer.

    check: `check(answer, reference)` is true for every answer that counts as right.
    tests: for an answer that is a Python function: it is right if it passes them, and `check` is not asked.
    follow_ups: further exercises on the same material, to be asked in the turns after this one.
    """

    question: str
    reference: str
    check: Callable[[str, str], bool] = same_text
    tests: FunctionTests | None = None
    follow_ups: tuple[Exercise, ...] = ()

    def is_right(self, answer: str) -> bool:
        """Whether `answer` counts as right. An answer with `tests` is executed: see `skills.execute`."""
        if self.tests is not None:
            return run_function(unfenced(answer), self.tests) is Verdict.PASS
        return self.check(answer, self.reference)


@dataclass(frozen=True, slots=True)
class Skill:
    """A family of exercises.

    `make(rng, world)` draws one exercise; equal generators of randomness and equal worlds give equal
    exercises. `max_tokens` is room enough for the right answer. `core` skills are those the shipped model
    has learnt: their mean is the headline number, the others are reported but would only add noise to it.
    `long` skills fill a conversation alone, the others are asked several in a row.
    """

    name: str
    title: str
    make: Callable[[random.Random, World], Exercise]
    max_tokens: int
    core: bool
    long: bool = False
