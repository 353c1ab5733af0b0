"""The small world that the exercises speak of: the names, places and words the shipped model has seen."""

from __future__ import annotations

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Ann Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Mary Nick Olive Paul Quinn Rose "
    "Sam Tom Una Victor Wendy Zoe"
)
LAST_NAMES = _words(
    "Bell Brook Cook Dean Field Ford Fox Gray Hart Hill King Lake Lee Marsh Moon North Rivers Stone West Wood"
)
CITIES = _words(
    "Athens Berlin Boston Cairo Delhi Dublin Lima London Madrid Oslo Paris Prague Rome Tokyo Vienna"
)
JOBS = _words("baker clerk cook doctor farmer gardener lawyer painter sailor smith tailor teacher")
WORDS = _words(
    "along and bank between bright children cold green its men old ran river sky slow steps the trees "
    "under walked was while with"
)
THINGS = _words("apples bottles ribbons")


def full_names(rng: random.Random, count: int) -> list[str]:
    """`count` different full names, e.g. `Rose Marsh`; at most 480."""
    pairs = rng.sample(range(len(FIRST_NAMES) * len(LAST_NAMES)), count)
    return [f"{FIRST_NAMES[p // len(LAST_NAMES)]} {LAST_NAMES[p % len(LAST_NAMES)]}" for p in pairs]


def secret_number(rng: random.Random) -> str:
    """Five digits, e.g. `48213`."""
    return str(rng.randrange(10_000, 100_000))


def secret_sentence(name: str, number: str) -> str:
    return f"The secret number of {name} is {number}."


def secret_question(name: str) -> str:
    return f"What is the secret number of {name}?"
