"""What the tiny Python functions are to do, with a body, inputs and a second definition to test against.

`{v}`, `{w}` and `{u}` stand for the arguments, `{k}` for a constant and `{i}` for another variable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Inputs = Callable[[int], Sequence[tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class FunctionTask:
    """One kind of function.

    words: how it goes on after "Write a Python function f that".
    body: the reference body, indented by four spaces.
    means: what it computes, from the arguments and, last, the constant; written apart from the body.
    inputs: argument tuples to try it on, given the constant.
    """

    words: str
    body: str
    means: Callable[..., Any]
    inputs: Inputs

    @property
    def arguments(self) -> int:
        return len(self.inputs(2)[0])


def numbers(k: int) -> list[tuple[int]]:
    return [(n,) for n in (0, 1, -1, 7, k, -k, 3 * k, 3 * k + 1, 100)]


def small_numbers(k: int) -> list[tuple[int]]:
    return [(n,) for n in (1, 2, 3, 5, 8)]


def pairs(k: int) -> list[tuple[int, int]]:
    return [(0, 0), (9, 4), (4, 9), (-3, 5), (5, -3), (7, 7), (100, 1)]


def triples(k: int) -> list[tuple[int, int, int]]:
    return [(1, 2, 3), (3, 1, 2), (2, 3, 1), (5, 5, 1), (-4, -2, -9), (0, 0, 0)]


def lists(k: int) -> list[tuple[list[int]]]:
    """Never empty, for tasks that have no answer for the empty list."""
    return [([5],), ([3, 9, 4],), ([9, 4, 3],), ([-2, -8],), ([1, 2, k, k + 1, 3 * k],), ([6, 6, 2, 6],)]


def any_lists(k: int) -> list[tuple[list[int]]]:
    return [([],), *lists(k)]


def lists_and_items(k: int) -> list[tuple[list[int], int]]:
    return [([3, 9, 3], 3), ([3, 9, 3], 9), ([3, 9, 3], 4), ([], 1), ([7], 7)]


def strings(k: int) -> list[tuple[str]]:
    return [("",), ("a",), ("abc",), ("Tom and Ann",), ("LEVEL up",)]


def full_strings(k: int) -> list[tuple[str]]:
    return [(text,) for (text,) in strings(k) if text]


def strings_and_letters(k: int) -> list[tuple[str, str]]:
    return [("banana", "a"), ("banana", "n"), ("banana", "z"), ("", "a"), ("Anna", "a")]


def lists_of_strings(k: int) -> list[tuple[list[str]]]:
    return [([],), (["a"],), (["old", "river", "ran"],), (["x", "", "y"],)]


def _loop(start: str, change: str, result: str = "{i}") -> str:
    return f"    {start}\n    for {{i}} in {{v}}:\n{change}\n    return {result}"


_TOTAL = _loop("total = 0", "        total += {i}", "total")
_LARGEST = _loop("best = {v}[0]", "        if {i} > best:\n            best = {i}", "best")
_SMALLEST = _loop("best = {v}[0]", "        if {i} < best:\n            best = {i}", "best")
_COUNT = _loop("count = 0", "        if {i} > {k}:\n            count += 1", "count")
_EVENS = _loop("total = 0", "        if {i} % 2 == 0:\n            total += {i}", "total")
_PRODUCT = _loop("total = 1", "        total *= {i}", "total")
_FACTORIAL = "    total = 1\n    for {i} in range(1, {v} + 1):\n        total *= {i}\n    return total"

TASKS = (
    FunctionTask("adds {k} to {v}", "    return {v} + {k}", lambda v, k: k + v, numbers),
    FunctionTask("multiplies {v} by {k}", "    return {v} * {k}", lambda v, k: k * v, numbers),
    FunctionTask("subtracts {k} from {v}", "    return {v} - {k}", lambda v, k: -k + v, numbers),
    FunctionTask("returns {v} plus {w}", "    return {v} + {w}", lambda v, w, k: sum([v, w]), pairs),
    FunctionTask("returns {v} minus {w}", "    return {v} - {w}", lambda v, w, k: -w + v, pairs),
    FunctionTask("returns {v} times {w}", "    return {v} * {w}", lambda v, w, k: math.prod([v, w]), pairs),
    FunctionTask(
        "returns the larger of {v} and {w}",
        "    return {v} if {v} > {w} else {w}",
        lambda v, w, k: max(v, w),
        pairs,
    ),
    FunctionTask(
        "returns the smaller of {v} and {w}",
        "    return {v} if {v} < {w} else {w}",
        lambda v, w, k: min(v, w),
        pairs,
    ),
    FunctionTask(
        "returns True if {v} is divisible by {k}",
        "    return {v} % {k} == 0",
        lambda v, k: v // k * k == v,
        numbers,
    ),
    FunctionTask(
        "returns the string {v} reversed", "    return {v}[::-1]", lambda v, k: "".join(reversed(v)), strings
    ),
    FunctionTask("returns the sum of the list {v}", _TOTAL, lambda v, k: sum(v), any_lists),
    FunctionTask("returns the largest item of the list {v}", _LARGEST, lambda v, k: max(v), lists),
    FunctionTask(
        "returns the items of the list {v} greater than {k}",
        "    return [{i} for {i} in {v} if {i} > {k}]",
        lambda v, k: list(filter(lambda item: item > k, v)),
        any_lists,
    ),
    FunctionTask(
        "counts the items of the list {v} greater than {k}",
        _COUNT,
        lambda v, k: len([item for item in v if item > k]),
        any_lists,
    ),
    FunctionTask(
        "returns the absolute value of {v}",
        "    return {v} if {v} >= 0 else -{v}",
        lambda v, k: abs(v),
        numbers,
    ),
    FunctionTask("returns True if {v} is even", "    return {v} % 2 == 0", lambda v, k: not v & 1, numbers),
    FunctionTask("returns True if {v} is odd", "    return {v} % 2 == 1", lambda v, k: bool(v & 1), numbers),
    FunctionTask("returns the square of {v}", "    return {v} * {v}", lambda v, k: pow(v, 2), numbers),
    FunctionTask(
        "returns {v} to the power {k}", "    return {v} ** {k}", lambda v, k: pow(v, k), small_numbers
    ),
    FunctionTask("returns the factorial of {v}", _FACTORIAL, lambda v, k: math.factorial(v), small_numbers),
    FunctionTask(
        "returns the largest of {v}, {w} and {u}",
        "    return max({v}, {w}, {u})",
        lambda v, w, u, k: sorted([v, w, u])[-1],
        triples,
    ),
    FunctionTask(
        "returns the first item of the list {v}", "    return {v}[0]", lambda v, k: next(iter(v)), lists
    ),
    FunctionTask(
        "returns the last item of the list {v}", "    return {v}[-1]", lambda v, k: v[len(v) - 1], lists
    ),
    FunctionTask(
        "returns the length of the list {v}", "    return len({v})", lambda v, k: sum(1 for _ in v), any_lists
    ),
    FunctionTask("returns the smallest item of the list {v}", _SMALLEST, lambda v, k: min(v), lists),
    FunctionTask(
        "returns the average of the list {v}",
        "    return sum({v}) / len({v})",
        lambda v, k: math.fsum(v) / len(v),
        lists,
    ),
    FunctionTask("returns the product of the list {v}", _PRODUCT, lambda v, k: math.prod(v), any_lists),
    FunctionTask(
        "returns the sum of the even items of the list {v}",
        _EVENS,
        lambda v, k: sum(item for item in v if not item & 1),
        any_lists,
    ),
    FunctionTask(
        "doubles each item of the list {v}",
        "    return [{i} * 2 for {i} in {v}]",
        lambda v, k: [item + item for item in v],
        any_lists,
    ),
    FunctionTask(
        "returns the squares of the list {v}",
        "    return [{i} * {i} for {i} in {v}]",
        lambda v, k: [pow(item, 2) for item in v],
        any_lists,
    ),
    FunctionTask(
        "returns the list {v} in reverse order",
        "    return {v}[::-1]",
        lambda v, k: list(reversed(v)),
        any_lists,
    ),
    FunctionTask(
        "returns the list {v} sorted", "    return sorted({v})", lambda v, k: [*sorted(v)], any_lists
    ),
    FunctionTask(
        "returns True if the list {v} is empty", "    return len({v}) == 0", lambda v, k: v == [], any_lists
    ),
    FunctionTask(
        "returns True if the list {v} contains {w}",
        "    return {w} in {v}",
        lambda v, w, k: v.count(w) > 0,
        lists_and_items,
    ),
    FunctionTask(
        "returns the string {v} in upper case", "    return {v}.upper()", lambda v, k: str.upper(v), strings
    ),
    FunctionTask(
        "returns the length of the string {v}", "    return len({v})", lambda v, k: sum(1 for _ in v), strings
    ),
    FunctionTask(
        "returns the first letter of the string {v}", "    return {v}[0]", lambda v, k: v[:1], full_strings
    ),
    FunctionTask(
        "counts how often the letter {w} occurs in the string {v}",
        "    return {v}.count({w})",
        lambda v, w, k: sum(letter == w for letter in v),
        strings_and_letters,
    ),
    FunctionTask(
        "joins the strings of the list {v} with spaces",
        '    return " ".join({v})',
        lambda v, k: " ".join(str(part) for part in v),
        lists_of_strings,
    ),
)
