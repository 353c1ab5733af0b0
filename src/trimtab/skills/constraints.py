"""Answers that must keep to a rule. Several answers may be right, so the rule is checked, not the text."""

from __future__ import annotations

import random
from functools import partial

from trimtab.skills import vocabulary as words
from trimtab.skills.base import Exercise, Skill
from trimtab.skills.world import World

NUMBERS = ("zero", "one", "two", "three", "four", "five")
ALL_WORDS = tuple(dict.fromkeys(words.WORDS + words.MORE_WORDS))
MOST = 5  # words that start with one letter; letters with fewer words are not asked for
LETTERS = tuple(
    letter for letter in "abcdefghijklmnopqrstuvwxyz" if sum(w[0] == letter for w in ALL_WORDS) >= MOST
)


def words_from(answer: str, reference: str, *, count: int, allowed: tuple[str, ...]) -> bool:
    """Exactly `count` different words, all of them allowed; commas between them do not count."""
    given = answer.replace(",", " ").split()
    return len(given) == count == len(set(given)) and set(given) <= set(allowed)


def words_starting(answer: str, reference: str, *, count: int, letter: str) -> bool:
    """Exactly `count` different words that start with `letter` and have nothing but letters."""
    given = answer.lower().replace(",", " ").split()
    right = all(word.isalpha() and word[0] == letter for word in given)
    return right and len(given) == count == len(set(given))


def yes_or_no(answer: str, reference: str) -> bool:
    """`yes` or `no`, whatever its case and with or without a full stop."""
    return answer.strip().rstrip(".").lower() == reference


def _some_of(rng: random.Random, world: World) -> Exercise:
    line = world.phrase(rng).split()
    count = rng.randint(1, min(MOST, len(line) - 1))
    question = f"Answer with exactly {NUMBERS[count]} word{'s' * (count > 1)} from: {', '.join(line)}"
    return Exercise(
        question, " ".join(line[:count]), check=partial(words_from, count=count, allowed=tuple(line))
    )


def _starting(rng: random.Random, world: World) -> Exercise:
    count, letter = world.draw(
        lambda: (rng.randint(1, MOST), rng.choice(LETTERS)), lambda made: world.has("starting", *made)
    )
    question = f"Write {NUMBERS[count]} word{'s' * (count > 1)} starting with {letter}."
    known = [word for word in ALL_WORDS if word[0] == letter]
    reference = " ".join(rng.sample(known, count))
    return Exercise(question, reference, check=partial(words_starting, count=count, letter=letter))


def _which_starts(rng: random.Random, world: World) -> Exercise:
    line = world.phrase(rng).split()
    letters = [word[0] for word in line]
    right = rng.choice([word for word in line if letters.count(word[0]) == 1] or line)
    matching = tuple(word for word in line if word[0] == right[0])
    question = f"Which word starts with {right[0]}: {', '.join(line)}?"
    return Exercise(question, right, check=partial(words_from, count=1, allowed=matching))


def _occurs(rng: random.Random, world: World) -> Exercise:
    line = world.phrase(rng).split()
    if rng.random() < 0.5:
        asked, reference = rng.choice(line), "yes"
    else:
        pool = words.WORDS if set(line) <= set(words.WORDS) else ALL_WORDS
        asked, reference = rng.choice([word for word in pool if word not in line]), "no"
    return Exercise(f"Does {asked} occur in: {' '.join(line)}?", reference, check=yes_or_no)


RULES = (_some_of, _starting, _which_starts, _occurs)


def _constraint(rng: random.Random, world: World) -> Exercise:
    return rng.choice(RULES)(rng, world)


CONSTRAINTS = Skill("constraints", "answer within a rule", _constraint, max_tokens=24, core=False)
