import random

import pytest

from trimtab.evaluation.corpus import shipped_text
from trimtab.skills import SKILLS, Passages, World
from trimtab.skills.function_tasks import TASKS
from trimtab.skills.functions import tests_of as make_tests

NAMES = {"v": "a", "w": "b", "u": "c", "i": "x", "k": 5}


def written(task):
    arguments = ", ".join("abc"[: task.arguments])
    return f"def f({arguments}):\n{task.body.format(**NAMES)}"


def passes(code, tests):
    """Our own references only, so they may run in this process."""
    space: dict = {}
    exec(code, space)
    try:
        return all(ascii(space["f"](*arguments)) == ascii(result) for arguments, result in tests.cases)
    except Exception:
        return False


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.words)
def test_a_task_is_passed_by_its_own_body_only(task):
    tests = make_tests(task, "f", 5)
    for other in TASKS:
        same = other.body == task.body
        assert passes(written(other), tests) == same, other.words
    assert not passes(f"def f({', '.join('abc'[: task.arguments])}):\n    return None", tests)


def test_there_are_thirty_tasks_with_different_words():
    assert len({task.words for task in TASKS}) == len(TASKS) >= 30


def test_references_are_short_functions_of_the_asked_name_that_carry_their_tests():
    rng, world = random.Random(0), World(Passages(shipped_text()))
    for _ in range(100):
        exercise = SKILLS["functions"].make(rng, world)
        assert exercise.tests is not None and exercise.tests.function in exercise.question
        assert exercise.reference.startswith(f"def {exercise.tests.function}(")
        space: dict = {}
        exec(exercise.reference, space)
        for arguments, result in exercise.tests.cases:
            assert ascii(space[exercise.tests.function](*arguments)) == ascii(result)
