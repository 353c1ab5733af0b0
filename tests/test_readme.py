"""What README and docs tell people to type works: commands parse, the quick ones and all Python run."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trimtab.cli.main import COMMANDS, app
from trimtab.errors import TrimtabError
from trimtab.plan import MethodChoice, Plan
from trimtab.registry import KV_CACHES, TASKS
from trimtab.serving.settings import gather

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = {"methods", "explain", "info"}


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block of that language."""
    found = []
    for page in PAGES:
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            found.append((page.name, text))
    return found


def commands() -> list[list[str]]:
    """Every shell command in the pages, as words."""
    # What only a server answers, over several lines: the server's own tests run it.
    texts = [text.replace("\\\n", " ") for _, text in blocks("bash") if not text.startswith("curl")]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


CALLS = [words[1:] for words in commands() if words[0] == "trimtab"]


def values(words: list[str], option: str) -> list[str]:
    return [after for before, after in pairwise(words) if before == option]


def test_every_shell_command_is_one_we_know():
    assert {words[0] for words in commands()} <= {"trimtab", "make", "pip", "curl", "lm_eval", "python"}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {words[1] for words in commands() if words[0] == "make"} <= targets


def test_every_command_has_an_example():
    assert {words[0] for words in CALLS} == set(COMMANDS)


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_a_command_parses(words):
    group = typer.main.get_command(app)
    command = group.get_command(None, words[0])  # type: ignore[attr-defined]
    context = command.make_context(words[0], words[1:])
    assert context.command is command
    for text in values(words, "--plan"):
        if not text.endswith(".yaml"):
            Plan.parse(text)
    for text in values(words, "--cache"):
        MethodChoice.parse(text, KV_CACHES)
    for text in values(words, "--task"):
        MethodChoice.parse(text, TASKS)
    for text in values(words, "--speed"):
        MethodChoice.parse(f"speed:{text}", TASKS)


@pytest.mark.parametrize("words", [words for words in CALLS if words[0] in QUICK], ids=" ".join)
def test_a_quick_command_runs(words):
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.strip()


# What these pages show needs a server or a hub; the tests of the server run what needs a server.
APART = {"api.md", "tools.md", "serving.md", "lm-eval.md"}


@pytest.mark.parametrize(
    ("page", "code"),
    [(page, code) for page, code in blocks("python") if page not in APART],
    ids=lambda value: value[:30].split("\n")[0],
)
def test_python_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, page, "exec"), {})
    if "print(" in code:
        assert said.getvalue().strip()


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=lambda value: value[:30].split("\n")[0])
def test_yaml_plans_are_plans(page, text, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    if page == "serving.md":
        settings = gather({}, {}, str(file))[0]
        assert [str(plan.cache) for plan in settings.plans] == ["full", "kivi:bits=2"]
        return
    assert Plan.from_file(file) == Plan.parse("cache=kivi:bits=2,group_size=32 dtype=bfloat16")


def test_the_error_shown_is_the_error_raised():
    (shown,) = re.findall(r"^error: (.*)$", (ROOT / "docs" / "plans.md").read_text(), re.M)
    with pytest.raises(TrimtabError) as caught:
        Plan.parse("kivy")
    assert str(caught.value) == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_names_every_policy_and_task():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in [*KV_CACHES.names(), *TASKS.names()]:
        assert f"`{name}`" in readme, name


def test_every_setting_of_a_plan_is_documented():
    table = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
    for name in Plan().to_dict():
        assert f"\n| `{name}` |" in table, name
