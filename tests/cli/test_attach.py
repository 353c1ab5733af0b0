"""`attach`: from a text to an attachment that a plan finds, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.attachment import Attachment
from trimtab.evaluation.corpus import shipped_text

SMALL = ("--option", "sequences=2", "--option", "tokens=64")


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "notes.txt"
    file.write_text(shipped_text()[:20_000])
    return str(file)


def test_an_attachment_is_made_and_used(trimtab_cli, data: str, tmp_path: Path) -> None:
    out = tmp_path / "kvquant"
    result = trimtab_cli("attach", "kvquant", "--data", data, "--out", str(out), *SMALL)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert "fitted on 128 tokens of notes.txt" in result.stderr
    assert Attachment.load(out).kind == "kvquant"
    plan = f"kvquant:attachment={out}"
    used = trimtab_cli("generate", "The ship", "--cache", plan, "--max-tokens", "3", "--backend", "torch")
    assert used.exit_code == 0

    again = trimtab_cli("attach", "kvquant", "--data", data, "--out", str(out), *SMALL)
    assert again.exit_code == 2 and "exists and is not empty; choose another folder or add" in again.stderr
    replaced = trimtab_cli(
        "attach", "rotatekv", "--data", data, "--out", str(out), "--overwrite", "--json", *SMALL
    )
    record = json.loads(replaced.stdout.splitlines()[-1])
    assert (record["kind"], record["made"]["tokens"], record["measured"]) == ("rotatekv", 128, {})
    assert Attachment.load(out).kind == "rotatekv"


def test_the_shipped_text_comes_with_a_warning(trimtab_cli, tmp_path: Path) -> None:
    out = tmp_path / "order"
    result = trimtab_cli("attach", "rotatekv", "--data", "shipped", "--out", str(out), *SMALL)
    assert result.exit_code == 0 and "figures on it will flatter" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["kvquan", "--data", "x", "--out", "y"],
            "unknown attachment method 'kvquan'. Did you mean 'kvquant'",
        ),
        (["kvquant", "--out", "y"], "--data is missing"),
        (["kvquant", "--data", "x"], "--out is missing"),
        (["kvquant", "--data", "none.txt", "--out", "y"], "'none.txt' does not exist"),
        (["kvquant", "--data", "x", "--out", "y", "--option", "seed"], "--option is 'seed'; write KEY=VALUE"),
        (["kvquant", "--data", "x", "--out", "y", "--option", "sed=1"], "unknown option 'sed'"),
        (["kvquant", "none", "--data", "x", "--out", "y"], "there is no folder 'none'"),
    ],
)
def test_a_mistake_is_one_line(trimtab_cli, tmp_path: Path, monkeypatch, words: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = trimtab_cli("attach", *words)
    assert result.exit_code == 2 and says in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "y").exists()


def test_data_that_are_too_short_name_the_way_out(trimtab_cli, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Only a few words are here.")
    words = ("attach", "kvquant", "--data", str(tmp_path / "short.txt"), "--out", str(tmp_path / "y"))
    result = trimtab_cli(*words)
    assert result.exit_code == 2 and "too short" in result.stderr and "sequences and tokens" in result.stderr
