"""Say it again, or in capitals: words of the word lists and sentences of real prose."""

from __future__ import annotations

import random

from trimtab.skills.base import Exercise, Skill
from trimtab.skills.world import World

REPEAT_QUESTIONS = ("Repeat: {text}",)
OTHER_REPEAT_QUESTIONS = ("Say again: {text}", "Copy this: {text}", "{text}\nRepeat this.")
CAPITALS_QUESTIONS = ("Say in capitals: {text}",)
OTHER_CAPITALS_QUESTIONS = ("Write in capital letters: {text}", "{text}\nSay this in capitals.")


def phrase_or_sentence(rng: random.Random, world: World) -> str:
    return world.phrase(rng) if rng.random() < 0.5 else world.sentence(rng)


def _repeat(rng: random.Random, world: World) -> Exercise:
    text = phrase_or_sentence(rng, world)
    # `replace`, not `format`: prose may hold braces.
    question = world.worded(rng, REPEAT_QUESTIONS, OTHER_REPEAT_QUESTIONS).replace("{text}", text)
    return Exercise(question, text)


def _capitals(rng: random.Random, world: World) -> Exercise:
    text = phrase_or_sentence(rng, world)
    question = world.worded(rng, CAPITALS_QUESTIONS, OTHER_CAPITALS_QUESTIONS).replace("{text}", text)
    return Exercise(question, text.upper())


REPEAT = Skill("repeat", "repeat words and sentences", _repeat, max_tokens=72, core=True)
CAPITALS = Skill("capitals", "say words and sentences in capitals", _capitals, max_tokens=120, core=False)
