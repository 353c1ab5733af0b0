"""Small changes to a line of words: replace, delete, first and last, reverse, small letters, count, sort."""

from __future__ import annotations

import random
import re

from trimtab.skills import vocabulary as words
from trimtab.skills.base import Exercise, Skill, same_number
from trimtab.skills.texts import sentence
from trimtab.skills.world import World

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_MOST_WORDS = 10


def line_of_words(rng: random.Random, world: World) -> list[str]:
    """Three to ten words: from the word lists, or consecutive ones of real prose, without punctuation."""
    if rng.random() < 0.5:
        return world.phrase(rng).split()
    return world.draw(lambda: _cut(rng, world), lambda cut: len(cut) >= 3 and world.has_phrase(" ".join(cut)))


def _cut(rng: random.Random, world: World) -> list[str]:
    found = _WORD.findall(sentence(world.texts, rng))
    count = min(len(found), rng.randint(3, _MOST_WORDS))
    start = rng.randint(0, len(found) - count)
    return found[start : start + count]


def _replace(rng: random.Random, world: World, line: list[str]) -> Exercise:
    old = _single(rng, line)
    new = rng.choice([w for w in words.WORDS + words.MORE_WORDS if w not in line])
    changed = [new if word == old else word for word in line]
    return Exercise(f"Replace {old} by {new} in: {' '.join(line)}", " ".join(changed))


def _delete(rng: random.Random, world: World, line: list[str]) -> Exercise:
    gone = _single(rng, line)
    return Exercise(f"Delete {gone} from: {' '.join(line)}", " ".join(word for word in line if word != gone))


def _single(rng: random.Random, line: list[str]) -> str:
    """A word that the line has once, or any where all come twice."""
    return rng.choice([word for word in line if line.count(word) == 1] or line)


def _first(rng: random.Random, world: World, line: list[str]) -> Exercise:
    return Exercise(f"What is the first word of: {' '.join(line)}", line[0])


def _last(rng: random.Random, world: World, line: list[str]) -> Exercise:
    return Exercise(f"What is the last word of: {' '.join(line)}", line[-1])


def _reverse(rng: random.Random, world: World, line: list[str]) -> Exercise:
    return Exercise(f"Reverse the order of the words: {' '.join(line)}", " ".join(reversed(line)))


def _small(rng: random.Random, world: World, line: list[str]) -> Exercise:
    text = " ".join(line)
    shown = rng.choice((text.title(), text.upper(), text))
    return Exercise(f"Say in small letters: {shown}", text.lower())


def _count(rng: random.Random, world: World, line: list[str]) -> Exercise:
    return Exercise(f"Count the words: {' '.join(line)}", str(len(line)), check=same_number)


def _sort(rng: random.Random, world: World, line: list[str]) -> Exercise:
    small = [word.lower() for word in line]
    return Exercise(f"Sort the words: {' '.join(small)}", " ".join(sorted(small)))


CHANGES = (_replace, _delete, _first, _last, _reverse, _small, _count, _sort)


def _editing(rng: random.Random, world: World) -> Exercise:
    return rng.choice(CHANGES)(rng, world, line_of_words(rng, world))


EDITING = Skill("editing", "edit a line of words", _editing, max_tokens=64, core=False)
