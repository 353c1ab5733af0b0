"""Write a tiny Python function; whether it is right is found by running it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from trimtab.skills.base import Exercise, Skill
from trimtab.skills.execute import FunctionTests
from trimtab.skills.function_tasks import TASKS, FunctionTask
from trimtab.skills.world import World

FUNCTION_NAMES = ("apply", "calc", "f", "g", "h", "run", "solve")
MORE_FUNCTION_NAMES = (
    "answer",
    "compute",
    "do_it",
    "fn",
    "func",
    "func1",
    "helper",
    "make",
    "my_func",
    "work",
)
VARIABLES = ("a", "b", "m", "n", "x", "y", "z")
MORE_VARIABLES = ("c", "d", "p", "q", "s", "t", "u", "v", "w", "data", "num", "values")
CONSTANTS = range(2, 20)

QUESTIONS = ("Write a Python function {name} that {task}.",)
OTHER_QUESTIONS = (
    "Define a Python function {name} that {task}.",
    "In Python, write a function {name} that {task}.",
)


@dataclass(frozen=True, slots=True)
class _Named:
    """A task with everything chosen that its words leave open."""

    name: str
    variables: tuple[str, ...]  # as many as arguments, and one for loops
    k: int


def _function(rng: random.Random, world: World) -> Exercise:
    task = rng.choice(TASKS)
    strange = rng.random() < world.strangers
    named = world.draw(
        lambda: _name(rng, task, strange), lambda n: world.has("function", n.name, _words(task, n))
    )
    names = _names(task, named)
    arguments = ", ".join(named.variables[: task.arguments])
    reference = f"def {named.name}({arguments}):\n{task.body.format(**names)}"
    question = world.worded(rng, QUESTIONS, OTHER_QUESTIONS).format(name=named.name, task=_words(task, named))
    return Exercise(question, reference, tests=tests_of(task, named.name, named.k))


def tests_of(task: FunctionTask, function: str, k: int) -> FunctionTests:
    cases = tuple((arguments, task.means(*arguments, k)) for arguments in task.inputs(k))
    return FunctionTests(function, cases)


def _name(rng: random.Random, task: FunctionTask, strange: bool) -> _Named:
    name = rng.choice(MORE_FUNCTION_NAMES if strange else FUNCTION_NAMES)
    pool = MORE_VARIABLES if strange else VARIABLES
    return _Named(name, tuple(rng.sample(pool, task.arguments + 1)), rng.choice(CONSTANTS))


def _names(task: FunctionTask, named: _Named) -> dict[str, str | int]:
    *arguments, other = named.variables
    return dict(zip("vwu", arguments, strict=False)) | {"i": other, "k": named.k}


def _words(task: FunctionTask, named: _Named) -> str:
    return task.words.format(**_names(task, named))


FUNCTIONS = Skill("functions", "write a tiny Python function", _function, max_tokens=96, core=True)
