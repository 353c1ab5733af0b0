import random
import re

import pytest

from trimtab.evaluation.corpus import shipped_text
from trimtab.skills import SKILLS, Passages, World
from trimtab.skills.constraints import words_from, words_starting, yes_or_no

WORLD = World(Passages(shipped_text()))


def answered(pattern, skill="editing", count=400):
    """The groups of `pattern` in the questions it fits, with the reference answers."""
    rng = random.Random(pattern)
    made = [SKILLS[skill].make(rng, WORLD) for _ in range(count)]
    found = [(re.fullmatch(pattern, e.question), e) for e in made]
    cases = [(*match.groups(), e) for match, e in found if match]
    assert len(cases) > 15
    return cases


def test_replace_and_delete_change_one_word():
    for old, new, line, exercise in answered(r"Replace (\S+) by (\S+) in: (.*)"):
        assert exercise.reference == re.sub(rf"(?<!\S){old}(?!\S)", new, line) != line
    for gone, line, exercise in answered(r"Delete (\S+) from: (.*)"):
        left = exercise.reference.split()
        assert gone not in left and set(line.split()) == {gone, *left}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"What is the first word of: (.*)", lambda line: line.split(" ")[0]),
        (r"What is the last word of: (.*)", lambda line: line.rsplit(" ", 1)[-1]),
        (r"Reverse the order of the words: (.*)", lambda line: " ".join(line.split()[::-1])),
        (r"Say in small letters: (.*)", str.lower),
        (r"Count the words: (.*)", lambda line: str(line.count(" ") + 1)),
        (r"Sort the words: (.*)", lambda line: " ".join(sorted(line.split()))),
    ],
)
def test_other_changes(pattern, expected):
    for line, exercise in answered(pattern):
        assert exercise.reference == expected(line)


def test_rules_accept_every_answer_that_keeps_them_and_no_other():
    for count, line, exercise in answered(r"Answer with exactly (\w+) words? from: (.*)", "constraints"):
        words, wanted = line.split(", "), ["one", "two", "three", "four", "five"].index(count) + 1
        assert exercise.is_right(", ".join(words[-wanted:]))
        assert not exercise.is_right(" ".join(words[: wanted + 1]))
        assert not exercise.is_right(" ".join([*words[: wanted - 1], "other"]))
    for letter, line, exercise in answered(r"Which word starts with (\w): (.*)\?", "constraints"):
        right = [word for word in line.split(", ") if word[0] == letter]
        assert all(exercise.is_right(word) == (word in right) for word in line.split(", "))
    for word, line, exercise in answered(r"Does (\w+) occur in: (.*)\?", "constraints"):
        assert exercise.reference == ("yes" if word in line.split() else "no")
        assert not exercise.is_right("yes" if exercise.reference == "no" else "no")
    assert len(answered(r"Write (\w+) words? starting with \w\.", "constraints")) > 15


def test_checkers_are_strict_about_number_and_source():
    allowed = ("river", "sky", "old")
    assert words_from("sky, old", "", count=2, allowed=allowed)
    assert not words_from("sky sky", "", count=2, allowed=allowed)
    assert words_starting("Bread book", "", count=2, letter="b")
    assert not words_starting("bread bread", "", count=2, letter="b")
    assert not words_starting("b1 b2", "", count=2, letter="b")
    assert not words_starting("bread river", "", count=2, letter="b")
    assert yes_or_no("Yes.", "yes") and not yes_or_no("yes and no", "yes")
