"""Sums, differences and products of small numbers, bare and in words. Answers are bare numbers."""

from __future__ import annotations

import random
from collections.abc import Callable

from trimtab.skills import vocabulary as words
from trimtab.skills.base import Exercise, Skill, same_number
from trimtab.skills.split import pair_held_out
from trimtab.skills.world import World

PRODUCTS = 0.1  # of the arithmetic for training
SUM_QUESTIONS = ("What is {sum}?",)
OTHER_SUM_QUESTIONS = ("How much is {sum}?", "{sum} =", "Calculate {sum}.")

# Every problem is about `a` and `b`; the first kind ends with a + b, the second with a - b.
GAIN = ("{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?",)
OTHER_GAINS = (
    "{name} finds {a} {thing} and then {b} more. How many {thing} does {name} find?",
    "{name} has {a} {thing} and gets {b} more from {other}. How many {thing} does {name} have now?",
    "There are {a} {thing} in one bag and {b} {thing} in another. How many {thing} are there?",
    "{name} has {a} {thing} and {other} has {b}. How many {thing} do they have together?",
)
LOSS = ("{name} has {a} {thing} and gives away {b}. How many {thing} are left?",)
OTHER_LOSSES = (
    "{name} has {a} {thing} and loses {b}. How many {thing} does {name} have now?",
    "{name} had {a} {thing} and sold {b} to {other}. How many {thing} are left?",
    "There are {a} {thing} on a table. {name} takes {b} away. How many {thing} are left?",
    "{name} has {a} {thing} and {other} has {b}. How many more {thing} does {name} have?",
)


def _arithmetic(rng: random.Random, world: World) -> Exercise:
    question = world.worded(rng, SUM_QUESTIONS, OTHER_SUM_QUESTIONS)
    # The times table has to be known by heart, so nothing of it is held out.
    if world.split == "train" and rng.random() < PRODUCTS:
        a, b = rng.randrange(10), rng.randrange(10)
        return Exercise(question.format(sum=f"{a} * {b}"), str(a * b), check=same_number)
    a, b = _pair(world, rng, _any)
    if rng.random() < 0.5:
        return Exercise(question.format(sum=f"{a} + {b}"), str(a + b), check=same_number)
    if not world.negative:
        a, b = max(a, b), min(a, b)
    return Exercise(question.format(sum=f"{a} - {b}"), str(a - b), check=same_number)


def _word_problem(rng: random.Random, world: World) -> Exercise:
    gain = rng.random() < 0.5
    problem = world.worded(rng, GAIN if gain else LOSS, OTHER_GAINS if gain else OTHER_LOSSES)
    a, b = _pair(world, rng, _added if gain else _taken)
    first = [world.choice(rng, words.FIRST_NAMES, words.MORE_FIRST_NAMES) for _ in range(2)]
    name, other = first if first[0] != first[1] else (first[0], "a friend")
    thing = world.choice(rng, words.THINGS, words.MORE_THINGS)
    question = problem.format(name=name, other=other, thing=thing, a=a, b=b)
    return Exercise(question, str(a + b if gain else a - b), check=same_number)


def _pair(
    world: World, rng: random.Random, make: Callable[[random.Random], tuple[int, int]]
) -> tuple[int, int]:
    return world.draw(lambda: make(rng), lambda pair: pair_held_out(*pair) == (world.split == "held-out"))


def _any(rng: random.Random) -> tuple[int, int]:
    return rng.randrange(100), rng.randrange(100)


def _added(rng: random.Random) -> tuple[int, int]:
    return rng.randrange(2, 50), rng.randrange(2, 50)


def _taken(rng: random.Random) -> tuple[int, int]:
    left, taken = _added(rng)
    return left + taken, taken


ARITHMETIC = Skill("arithmetic", "add and subtract", _arithmetic, max_tokens=12, core=False)
WORD_PROBLEMS = Skill("word_problems", "one-step word problems", _word_problem, max_tokens=32, core=False)
