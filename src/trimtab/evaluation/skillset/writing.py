"""Skills that write something short and exact: records, functions, copies, sums."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from trimtab.evaluation.skillset import vocabulary as words
from trimtab.evaluation.skillset.base import Exercise, Skill, unfenced
from trimtab.evaluation.skillset.recall import record
from trimtab.evaluation.skillset.same_code import same_function

FUNCTION_NAMES = ("apply", "calc", "f", "g", "h", "run", "solve")
VARIABLES = ("a", "b", "m", "n", "x", "y", "z")


def _json_record(rng: random.Random) -> Exercise:
    r = record(rng, words.full_names(rng, 1)[0])
    sentence = rng.choice(
        (
            "In {city} lives {name}, a {job} aged {age}.",
            "{name} is a {age} year old {job} from {city}.",
            "{name}, {age}, works as a {job} in {city}.",
        )
    )
    return Exercise(f"Write as JSON: {sentence.format(**r)}", json.dumps(r), check=same_json)


def same_json(answer: str, reference: str) -> bool:
    """Equal as JSON values; key order and white space do not count."""
    try:
        return json.loads(unfenced(answer)) == json.loads(reference)
    except ValueError:
        return False


def _one(task: str, body: str) -> Callable[[random.Random], tuple[str, str, str]]:
    """A function of one variable `{v}` and a constant `{k}`."""

    def make(rng: random.Random) -> tuple[str, str, str]:
        v, other = rng.sample(VARIABLES, 2)
        k = rng.randrange(2, 20)
        return task.format(v=v, k=k), v, body.format(v=v, k=k, i=other)

    return make


def _two(task: str, body: str) -> Callable[[random.Random], tuple[str, str, str]]:
    """A function of two variables `{v}` and `{w}`."""

    def make(rng: random.Random) -> tuple[str, str, str]:
        v, w = rng.sample(VARIABLES, 2)
        return task.format(v=v, w=w), f"{v}, {w}", body.format(v=v, w=w)

    return make


FUNCTION_TASKS = (
    _one("adds {k} to {v}", "    return {v} + {k}\n"),
    _one("multiplies {v} by {k}", "    return {v} * {k}\n"),
    _two("returns {v} plus {w}", "    return {v} + {w}\n"),
    _two("returns {v} minus {w}", "    return {v} - {w}\n"),
    _two("returns {v} times {w}", "    return {v} * {w}\n"),
    _two("returns the larger of {v} and {w}", "    return {v} if {v} > {w} else {w}\n"),
    _two("returns the smaller of {v} and {w}", "    return {v} if {v} < {w} else {w}\n"),
    _one("returns True if {v} is divisible by {k}", "    return {v} % {k} == 0\n"),
    _one("returns the string {v} reversed", "    return {v}[::-1]\n"),
    _one(
        "returns the sum of the list {v}",
        "    total = 0\n    for {i} in {v}:\n        total += {i}\n    return total\n",
    ),
    _one(
        "returns the largest item of the list {v}",
        "    best = {v}[0]\n    for {i} in {v}:\n        if {i} > best:\n            best = {i}\n"
        "    return best\n",
    ),
    _one(
        "returns the items of the list {v} greater than {k}", "    return [{i} for {i} in {v} if {i} > {k}]\n"
    ),
    _one(
        "counts the items of the list {v} greater than {k}",
        "    count = 0\n    for {i} in {v}:\n        if {i} > {k}:\n            count += 1\n"
        "    return count\n",
    ),
)


def _function(rng: random.Random) -> Exercise:
    task, arguments, body = rng.choice(FUNCTION_TASKS)(rng)
    name = rng.choice(FUNCTION_NAMES)
    reference = f"def {name}({arguments}):\n{body}"
    return Exercise(f"Write a Python function {name} that {task}.", reference, check=same_function)


def _phrase(rng: random.Random) -> str:
    return " ".join(rng.sample(words.WORDS, rng.randint(3, 8)))


def _capitals(rng: random.Random) -> Exercise:
    phrase = _phrase(rng)
    return Exercise(f"Say in capitals: {phrase}", phrase.upper())


def _repeat(rng: random.Random) -> Exercise:
    phrase = _phrase(rng)
    return Exercise(f"Repeat: {phrase}", phrase)


def same_number(answer: str, reference: str) -> bool:
    """The last whole number of the answer is the reference, so a line of working before it is fine."""
    numbers = re.findall(r"-?\d+", answer)
    return bool(numbers) and int(numbers[-1]) == int(reference)


def _arithmetic(rng: random.Random) -> Exercise:
    a, b = rng.randrange(100), rng.randrange(100)
    if rng.random() < 0.5:
        return Exercise(f"What is {a} + {b}?", str(a + b), check=same_number)
    return Exercise(f"What is {max(a, b)} - {min(a, b)}?", str(abs(a - b)), check=same_number)


def _word_problem(rng: random.Random) -> Exercise:
    name, thing = rng.choice(words.FIRST_NAMES), rng.choice(words.THINGS)
    a, b = rng.randrange(2, 50), rng.randrange(2, 50)
    if rng.random() < 0.5:
        question = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?"
        return Exercise(question, str(a + b), check=same_number)
    a, b = a + b, b
    question = f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?"
    return Exercise(question, str(a - b), check=same_number)


JSON_RECORD = Skill("json", "write a record as JSON", _json_record, max_tokens=64, core=True)
FUNCTIONS = Skill("functions", "write a tiny Python function", _function, max_tokens=72, core=True)
CAPITALS = Skill("capitals", "say words in capitals", _capitals, max_tokens=64, core=False)
REPEAT = Skill("repeat", "repeat words", _repeat, max_tokens=32, core=True)
ARITHMETIC = Skill("arithmetic", "add and subtract", _arithmetic, max_tokens=12, core=False)
WORD_PROBLEMS = Skill("word_problems", "one-step word problems", _word_problem, max_tokens=32, core=False)
