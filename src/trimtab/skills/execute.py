"""Run a Python function that a model wrote against test inputs, in a process of its own.

This guards against mistakes: endless loops, runaway memory, stray output, files left behind. It is *not* a
security sandbox: hostile code can still read what this user can read and use the network. Run models that
you do not trust inside a container or a virtual machine.

The child is a bare interpreter (isolated mode, no site packages, empty environment, empty working folder
that is removed afterwards) with limits on address space, CPU time, file size and processes (the last does
not bind the superuser). After the wall-clock limit its whole process group is killed. Expected results
never enter the child: it is sent inputs and gives back the `repr` of each result.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("child.py")
SECONDS = 30.0  # wall clock, ample: on a busy machine only the limit on CPU time is a fair one
LIMITS = {"memory": 256 * 2**20, "cpu": 2, "file": 2**16}  # bytes, seconds, bytes
OUT_OF_TIME = -getattr(signal, "SIGXCPU", 0)


class Verdict(StrEnum):
    """What became of an answer. `UNAVAILABLE` says that nothing was run; it never counts as a pass."""

    PASS = "pass"
    WRONG = "wrong"  # ran, and gave another result for at least one input
    ERROR = "error"  # does not compile, lacks the function, raised, ran out of memory or died
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"  # this machine cannot run answers within limits


@dataclass(frozen=True, slots=True)
class FunctionTests:
    """Inputs and results of a function. Values are Python literals: numbers, strings, lists, booleans.

    function: the name the answer has to define.
    cases: pairs of positional arguments and the result, which must agree in type as well (`2` is not `2.0`).
    """

    function: str
    cases: tuple[tuple[tuple[Any, ...], Any], ...]


def run_function(code: str, tests: FunctionTests, *, seconds: float = SECONDS) -> Verdict:
    """The verdict on `code`, which is to define `tests.function`.

    `seconds` is the limit on wall-clock time for all cases together.
    """
    if os.name != "posix" or not sys.executable:
        return Verdict.UNAVAILABLE
    # What the answer prints cannot be mistaken for results: those follow a mark drawn anew each time.
    mark = secrets.token_hex(16)
    job = {
        "mark": mark,
        "code": code,
        "function": tests.function,
        "arguments": [arguments for arguments, _ in tests.cases],
        "limits": LIMITS,
    }
    with (
        tempfile.TemporaryDirectory(prefix="trimtab-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as sent,
        tempfile.TemporaryFile() as received,
    ):
        sent.write(ascii(job).encode())
        sent.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(CHILD)],
                stdin=sent,
                stdout=received,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
        except OSError:
            return Verdict.UNAVAILABLE
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Verdict.TIMEOUT
        finally:
            _end(process)
        received.seek(0)
        _, found, results = received.read().decode(errors="replace").rpartition(mark)
    if status == OUT_OF_TIME:
        return Verdict.TIMEOUT
    return _verdict(results if found else "error", tests)


def can_run() -> bool:
    """Whether this machine can run answers within their limits."""
    return run_function("def f(a):\n    return a", FunctionTests("f", (((1,), 1),))) is Verdict.PASS


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and everything it started in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(results: str, tests: FunctionTests) -> Verdict:
    """`results` is `unavailable`, `error`, or one line a case with the `ascii` form of its result."""
    if results in ("unavailable", "error"):
        return Verdict(results)
    expected = [ascii(result) for _, result in tests.cases]
    return Verdict.PASS if results.split("\n") == expected else Verdict.WRONG
