"""The surface of the command line is frozen in help/*.txt, and asking for it costs nothing.

After a wanted change: UPDATE_HELP=1 pytest tests/cli/test_help.py, and look at the diff.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.cli.main import COMMANDS

FOLDER = Path(__file__).parent / "help"
PARTS = ("inspect heads", "bench serve")  # commands of a group
HEAVY = ("torch", "numpy", "rich", "transformers", "tokenizers", "yaml", "jinja2", "huggingface_hub")


@pytest.mark.parametrize("command", ["trimtab", *COMMANDS, *PARTS])
def test_help_is_as_written_down(trimtab_cli, command):
    words = [] if command == "trimtab" else command.split()
    result = trimtab_cli(*words, "--help")
    assert result.exit_code == 0
    file = FOLDER / f"{command}.txt"
    if os.environ.get("UPDATE_HELP"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(result.stdout, encoding="utf-8")
    assert result.stdout == file.read_text(encoding="utf-8")


def test_nothing_else_is_written_down():
    assert {file.stem for file in FOLDER.glob("*.txt")} == {"trimtab", *COMMANDS, *PARTS}


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["--version"], *([*name.split(), "-h"] for name in (*COMMANDS, *PARTS))]
)
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\n"
        "from trimtab.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_short_forms(trimtab_cli):
    assert trimtab_cli("-h").stdout == trimtab_cli("--help").stdout
    assert trimtab_cli("info", "-h").stdout == trimtab_cli("info", "--help").stdout


def test_the_version_is_the_package_s(trimtab_cli):
    import trimtab

    assert trimtab_cli("--version").stdout == f"trimtab {trimtab.__version__}\n"


def test_help_names_the_tasks_that_compare_runs_by_default():
    from trimtab.cli.compare import TASKS
    from trimtab.evaluation.runner import DEFAULT_TASKS

    assert TASKS == DEFAULT_TASKS
