"""`train`: what is wrong on its command line is told in one line, before anything is loaded or written."""

from __future__ import annotations

import pytest

RECIPE = "output: out\nmodel: {source: shipped}\nmixture: [{kind: documents, paths: [a.txt]}]\ntokens: 100\n"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("tokens", "--set is 'tokens'; write KEY=VALUE"),
        ("mixture=[{kind", "the value of --set mixture cannot be read"),
        ("optimizer.lr=-1e-3", "'lr' of the optimizer is -0.001"),
        ("token=1e3", "Did you mean 'tokens' or"),
        ("mixture.2.weight=1", "there is no 'mixture.2.weight' in the recipe"),
    ],
)
def test_a_wrong_setting_is_one_line(trimtab_cli, tmp_path, monkeypatch, change, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = trimtab_cli("train", "recipe.yaml", "--set", change)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert told in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_no_threads_are_refused(trimtab_cli):
    result = trimtab_cli("train", "recipe.yaml", "--threads", "0")
    assert (result.exit_code, result.stderr) == (2, "error: --threads is 0; it must be at least 1\n")
