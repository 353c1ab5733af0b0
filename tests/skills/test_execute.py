import os
import time
from pathlib import Path

import pytest

from trimtab.skills import execute
from trimtab.skills.base import Exercise
from trimtab.skills.execute import FunctionTests, Verdict, can_run, run_function

DOUBLE = FunctionTests("f", (((1,), 2), ((-3,), -6)))
pytestmark = pytest.mark.skipif(os.name != "posix", reason="answers are run on POSIX systems only")


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("def f(a):\n    return a * 2", "pass"),
        ("print('2\\n-6')\ndef f(a):\n    print(a)\n    return a * 2", "pass"),
        ("def f(a):\n    return 2", "wrong"),
        ("def f(a):\n    return a * 2.0", "wrong"),
        ("def f(a):\n    return str(a * 2)", "wrong"),
        ("def f(a):", "error"),
        ("def g(a):\n    return a * 2", "error"),
        ("def f(a):\n    return a / 0", "error"),
        ("def f(a):\n    raise SystemExit(0)", "error"),
        ("import os\nos._exit(0)", "error"),
        ("import os\nos.kill(os.getpid(), 9)", "error"),
        ("def f(a):\n    return [0] * 10**9", "error"),
        ("def f(a):\n    return f(a)", "error"),
        ("import numpy\ndef f(a):\n    return a * 2", "error"),  # nothing but the standard library
        ("def f(a):\n    return 'x' * 10**6", "wrong"),  # more than an answer may write
        ("\0", "error"),
        ("(" * 100_000, "error"),
        ("", "error"),
    ],
)
def test_verdicts(code, verdict):
    assert run_function(code, DOUBLE) == verdict


@pytest.mark.parametrize("code", ["while True: pass", "import time\ntime.sleep(600)"])
def test_an_answer_that_does_not_end_is_stopped(code):
    start = time.monotonic()
    assert run_function(code, DOUBLE, seconds=0.2) is Verdict.TIMEOUT
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_the_limit_on_cpu_time_is_a_timeout_too():
    assert run_function("while True: pass", DOUBLE, seconds=300) is Verdict.TIMEOUT


def test_the_child_sees_neither_environment_nor_files_of_ours(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    look = "import os\ndef f():\n    return [os.listdir('.'), 'SECRET' in os.environ]"
    assert run_function(look, FunctionTests("f", (((), [[], False]),))) is Verdict.PASS


def test_files_are_limited_and_removed(tmp_path):
    place = tmp_path / "where"
    code = (
        f"import os\nopen({str(place)!r}, 'w').write(os.getcwd())\nopen('left', 'w').write('x')\n"
        "def f(a):\n    return a * 2"
    )
    assert run_function(code, DOUBLE) is Verdict.PASS
    assert not Path(place.read_text()).exists()
    large = "with open('large', 'w') as file:\n    file.write('x' * 10**6)\ndef f(a):\n    return a * 2"
    assert run_function(large, DOUBLE) is Verdict.ERROR


def test_processes_it_started_are_ended_with_it(tmp_path):
    place = tmp_path / "pid"
    code = (
        "import os, time\npid = os.fork()\nif pid == 0:\n    time.sleep(600)\n"
        f"open({str(place)!r}, 'w').write(str(pid))\n"
        "def f(a):\n    return a * 2"
    )
    verdict = run_function(code, DOUBLE)
    if verdict is Verdict.ERROR and not place.exists():
        return  # the limit on processes, which does not bind the superuser, forbade the fork
    assert verdict is Verdict.PASS
    state = Path(f"/proc/{place.read_text()}/stat")
    deadline = time.monotonic() + 60
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize("program", ["", "/nowhere/python"])
def test_a_machine_that_cannot_run_answers_says_so_and_passes_none(monkeypatch, program):
    monkeypatch.setattr(execute.sys, "executable", program)
    right = "def f(a):\n    return a * 2"
    assert run_function(right, DOUBLE) is Verdict.UNAVAILABLE
    assert not can_run()
    assert not Exercise("", right, tests=DOUBLE).is_right(right)


def test_a_fenced_answer_is_unwrapped_and_one_failure_spoils_no_other():
    exercise = Exercise("", "", tests=DOUBLE)
    right = "```python\ndef f(a):\n    return a + a\n```\nThis doubles it."
    assert [exercise.is_right(a) for a in (right, "import os\nos.abort()", right)] == [True, False, True]
    assert can_run()
