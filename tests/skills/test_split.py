"""No parameter of a held-out exercise is ever met in training."""

import json
import random
import re

import pytest

from trimtab.evaluation.corpus import shipped_text
from trimtab.skills import SKILLS, Passages, World, held_out
from trimtab.skills.function_tasks import TASKS
from trimtab.skills.functions import CONSTANTS, FUNCTION_NAMES, VARIABLES
from trimtab.skills.split import pair_held_out

TEXTS = Passages(shipped_text())
DRAWS = {"train": 1_500, "held-out": 450}  # a passkey and a lookup have several parameters each


def parameters(name, exercise):
    """What is particular about an exercise, read from its text."""
    question = exercise.question
    if name == "passkey":
        return re.findall(r"The secret number of (\w+ \w+) is (\d+)\.", question)
    if name == "lookup":
        return [tuple(json.loads(line).values()) for line in question.splitlines() if line[0] == "{"]
    if name == "json":
        return [tuple(json.loads(exercise.reference).values())]
    if name in ("arithmetic", "word_problems"):
        return [] if "*" in question else [tuple(sorted(map(int, re.findall(r"\d+", question))))]
    if name == "functions":
        return [tuple(re.search(r"(\w+) that (.*)\.", question).groups())]
    if name in ("repeat", "capitals"):
        return [exercise.reference.upper()]
    return [question]


def drawn(names, split):
    world = World(TEXTS, split=split, characters=(300, 400))
    found = set()
    for name in names:
        rng = random.Random(f"{name} {split}")
        for _ in range(DRAWS[split] // (3 if name in ("passkey", "lookup") else 1)):
            found.update(parameters(name, SKILLS[name].make(rng, world)))
    return found


# Skills in one row share their parameters, so they must be disjoint together.
@pytest.mark.parametrize(
    "names",
    [
        ["passkey"],
        ["lookup", "json"],
        ["arithmetic", "word_problems"],
        ["functions"],
        ["repeat", "capitals"],
        ["editing"],
        ["constraints"],
    ],
    ids="+".join,
)
def test_the_splits_are_disjoint(names):
    train, test = drawn(names, "train"), drawn(names, "held-out")
    assert len(train) > 1_000 and len(test) > 150
    assert not train & test


def test_one_pair_of_numbers_in_ten_is_held_out_in_either_order():
    pairs = [(a, b) for a in range(100) for b in range(100)]
    assert 0.08 < sum(pair_held_out(*pair) for pair in pairs) / len(pairs) < 0.12
    assert all(pair_held_out(a, b) == pair_held_out(b, a) for a, b in pairs)
    # Every number is met in training, many times.
    assert all(sum(not pair_held_out(a, b) for b in range(100)) > 60 for a in range(100))


def test_every_function_is_in_both_splits():
    for task in TASKS:
        splits = set()
        for name in FUNCTION_NAMES:
            for v, w, u in zip(VARIABLES, VARIABLES[1:] + VARIABLES, VARIABLES[2:] + VARIABLES, strict=False):
                words = task.words.format(v=v, w=w, u=u, k=CONSTANTS[0])
                splits.add(held_out("function", name, words))
        assert splits == {True, False}, task.words


def test_the_split_is_the_same_for_ever():
    """With another split, models trained so far would have met held-out parameters."""
    assert [n for n in range(100) if held_out("numbers", 7, n)] == [
        10,
        12,
        18,
        21,
        23,
        27,
        29,
        32,
        41,
        50,
        83,
        89,
    ]
    assert [n for n in range(20, 90) if held_out("record", "Rose Marsh", n, "Oslo", "baker")] == [
        36,
        39,
        51,
        64,
        71,
    ]
    assert [v for v in "abefgi" if held_out("function", "f", f"adds 2 to {v}")] == ["e", "i"]
    assert [p for p in ("the river", "the sky", "old bank") if held_out("phrase", p)] == [
        "the sky",
        "old bank",
    ]
