"""What exercises are drawn from: the prose, the split, and how far they may stray from the main form."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

from trimtab.errors import ConfigError, did_you_mean
from trimtab.skills import vocabulary as words
from trimtab.skills.split import Split, held_out
from trimtab.skills.texts import Texts, sentence

T = TypeVar("T")
_ATTEMPTS = 10_000


@dataclass(frozen=True, slots=True)
class World:
    """Settings of all skills.

    texts: where prose is taken from.
    split: `train`, or `held-out` for parameters that training never uses.
    characters: least and most prose of a passkey exercise; a token is about 3.4 characters.
    secrets, records: least and most of them in a passkey and a lookup exercise.
    negative: whether differences may be below zero.
    paraphrases: share of exercises in other words than the main form's.
    strangers: share of exercises with names, cities, jobs and words that are not in the main lists.
    """

    texts: Texts
    split: Split = "train"
    characters: tuple[int, int] = (300, 6_500)
    secrets: tuple[int, int] = (1, 4)
    records: tuple[int, int] = (2, 12)
    negative: bool = False
    paraphrases: float = 0.2
    strangers: float = 0.15

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ConfigError(
                f"no split {self.split!r} of the skills.{did_you_mean(self.split, get_args(Split))}"
            )
        for name, floor, ceiling in (("characters", 50, None), ("secrets", 1, 20), ("records", 1, 100)):
            least, most = getattr(self, name)
            if not floor <= least <= most or (ceiling and most > ceiling):
                within = f"from {floor} up" if ceiling is None else f"from {floor} to {ceiling}"
                raise ConfigError(
                    f"option {name!r} of the skills is ({least}, {most}); "
                    f"give the least and the most, {within}"
                )
        for name in ("paraphrases", "strangers"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"option {name!r} of the skills is {getattr(self, name)}; it is a share between 0 and 1"
                )

    def has(self, kind: str, *parameters: str | int) -> bool:
        """Whether these parameters belong to this world's split."""
        return held_out(kind, *parameters) == (self.split == "held-out")

    def draw(self, make: Callable[[], T], belongs: Callable[[T], bool]) -> T:
        """The first of the things made that belongs to the split."""
        for _ in range(_ATTEMPTS):
            made = make()
            if belongs(made):
                return made
        raise ConfigError(
            f"the texts hold too few different sentences for the split {self.split!r} of the skills; "
            "give more text"
        )

    def worded(self, rng: random.Random, main: Sequence[T], others: Sequence[T]) -> T:
        """One of the main wordings, or now and then one of the others."""
        return rng.choice(others if rng.random() < self.paraphrases else main)

    def people(self, rng: random.Random, count: int) -> list[str]:
        """`count` different full names, all from the main lists, all from longer ones or all invented."""
        if rng.random() >= self.strangers:
            return words.full_names(rng, count)
        if rng.random() < 0.5:
            return words.paired_names(rng, count, words.MORE_FIRST_NAMES, words.MORE_LAST_NAMES)
        found: dict[str, None] = {}
        while len(found) < count:
            found[f"{words.invented(rng).title()} {words.invented(rng).title()}"] = None
        return list(found)

    def choice(self, rng: random.Random, main: Sequence[str], more: Sequence[str]) -> str:
        """A word of the main list, or now and then of the longer one, or an invented one in its stead."""
        if rng.random() >= self.strangers:
            return rng.choice(main)
        if rng.random() < 0.5:
            return rng.choice(more)
        made = words.invented(rng)
        return made.title() if main[0][0].isupper() else made

    def phrase(self, rng: random.Random) -> str:
        """Three to eight words of the word lists that belong to the split, e.g. `the old river ran`."""
        count = rng.randint(3, 8)
        pool = words.WORDS if rng.random() >= self.strangers else words.MORE_WORDS
        return self.draw(lambda: " ".join(rng.sample(pool, count)), self.has_phrase)

    def sentence(self, rng: random.Random) -> str:
        """A sentence of the prose that belongs to the split."""
        return self.draw(lambda: sentence(self.texts, rng), self.has_phrase)

    def has_phrase(self, phrase: str) -> bool:
        return self.has("phrase", phrase.lower())
