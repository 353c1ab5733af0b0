import itertools
import json
import random

import pytest

from trimtab.evaluation.skillset import SKILLS
from trimtab.evaluation.skillset.same_code import same_function
from trimtab.evaluation.skillset.vocabulary import full_names
from trimtab.evaluation.skillset.writing import same_json, same_number


def exercises(name, count=60):
    rng = random.Random(name)
    return [SKILLS[name].make(rng) for _ in range(count)]


@pytest.mark.parametrize("name", SKILLS)
def test_the_reference_is_right_and_other_answers_are_wrong(name):
    made = exercises(name)
    for exercise in made:
        assert exercise.is_right(exercise.reference)
        assert exercise.is_right(f"  {exercise.reference}\n")
        assert not exercise.is_right("")
    wrong = sum(a.is_right(b.reference) for a, b in itertools.pairwise(made))
    assert wrong <= 6  # two sums may be equal, two five-digit numbers hardly


@pytest.mark.parametrize("name", SKILLS)
def test_equal_seeds_give_equal_exercises_and_others_differ(name):
    first = [e.question for e in exercises(name)]
    assert first == [e.question for e in exercises(name)]
    assert first != [SKILLS[name].make(random.Random(1)).question for _ in first]
    assert len(set(first)) > 40


@pytest.mark.parametrize("name", SKILLS)
def test_the_right_answer_fits_into_max_tokens(name):
    from evaluation.fakes import shipped_tokenizer

    for exercise in exercises(name):
        assert len(shipped_tokenizer().encode(exercise.reference)) < SKILLS[name].max_tokens


def test_recall_exercises_hold_their_answer_once_in_the_prompt():
    for exercise in exercises("passkey", 20):
        assert exercise.question.count(exercise.reference) == 1
    for exercise in exercises("lookup", 20):
        *lines, question = exercise.question.splitlines()
        records = [json.loads(line) for line in lines]
        asked = next(r for r in records if r["name"] in question)
        field = next(f for f in ("age", "city", "job") if f"the {f} of" in question)
        assert str(asked[field]) == exercise.reference


def test_json_exercise_says_every_value():
    for exercise in exercises("json", 20):
        for value in json.loads(exercise.reference).values():
            assert str(value) in exercise.question


def test_arithmetic_is_right():
    for exercise in exercises("arithmetic"):
        assert eval(exercise.question.removeprefix("What is ").removesuffix("?")) == int(exercise.reference)


def test_functions_compute_what_they_are_asked_for():
    asked = {
        "adds 2": lambda f: f(5) == 7,
        "returns the sum": lambda f: f([1, 2, 4]) == 7,
        "the largest item": lambda f: f([3, 9, 4]) == 9,
        "the larger of": lambda f: f(3, 9) == 9 and f(9, 3) == 9,
        "the smaller of": lambda f: f(3, 9) == 3 and f(9, 3) == 3,
        "reversed": lambda f: f("abc") == "cba",
        "minus": lambda f: f(9, 4) == 5,
        "counts the items": lambda f: f([100, 1, 200]) == 2,
        "returns the items": lambda f: f([100, 1, 200]) == [100, 200],
        "divisible": lambda f: f(0) is True,
    }
    seen = set()
    for exercise in exercises("functions", 300):
        space: dict = {}
        exec(exercise.reference, space)  # our own references, not a model's
        function = space[exercise.question.split()[4]]
        for words, holds in asked.items():
            if words in exercise.question:
                assert holds(function), exercise
                seen.add(words)
    assert seen == set(asked)


SUM = "def f(b):\n    total = 0\n    for x in b:\n        total += x\n    return total\n"


@pytest.mark.parametrize(
    "answer",
    [
        SUM.replace("x", "item").replace("total", "s"),
        SUM.replace("for x", "for b").replace("+= x", "+= b"),
        "```python\n" + SUM + "```\nThis function adds them up.",
        SUM.replace("    ", "  "),
    ],
)
def test_functions_that_differ_in_names_of_locals_only_are_the_same(answer):
    assert same_function(answer, SUM)


@pytest.mark.parametrize(
    "answer",
    [
        SUM.replace("f(b)", "g(b)"),
        SUM.replace("b", "c"),
        SUM.replace("= 0", "= 1"),
        SUM.replace("return total", "return x"),
        SUM.replace("+= x", "+= total"),
        SUM.replace("total = 0", "x = 0").replace("return total", "return x"),
        SUM + SUM,
        "def f(b:",
        "\0",
        "(" * 100_000,
    ],
)
def test_functions_that_mean_something_else_are_not(answer):
    assert not same_function(answer, SUM)


def test_rebinding_a_local_does_not_make_two_variables_one():
    ours = "def f(b):\n    x = 0\n    for x in b:\n        y = x\n    return y\n"
    theirs = "def f(b):\n    x = 0\n    for x in b:\n        y = x\n    return x\n"
    assert not same_function(ours, theirs)


def test_nothing_a_model_writes_is_executed(tmp_path):
    trap = f"open({str(tmp_path / 'trap')!r}, 'w')"
    assert not same_function(trap, SUM)
    assert not same_json(trap, "{}")
    assert not list(tmp_path.iterdir())


def test_json_and_numbers_are_compared_as_values():
    assert same_json('{"b": 1,\n "a": "x"}', '{"a": "x", "b": 1}')
    assert not same_json('{"a": "1"}', '{"a": 1}')
    assert not same_json("{", "{}")
    assert same_number("20 - 2 = 18. The answer is 18.", "18")
    assert not same_number("18 or 19", "18")
    assert not same_number("none", "0")


def test_names_are_different_and_all_can_be_drawn():
    everybody = full_names(random.Random(0), 480)
    assert len(set(everybody)) == 480
