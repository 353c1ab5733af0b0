"""`--adapter`: the same setting in every command that runs a model."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("command", "code"),
    [(["generate", "Hello"], 2), (["chat"], 2), (["eval"], 1), (["bench"], 1)],  # 1: a cell that failed
)
def test_an_adapter_that_is_not_there_is_one_sentence(trimtab_cli, command, code, tmp_path):
    result = trimtab_cli(*command, "--adapter", str(tmp_path / "none"), "--backend", "torch", stdin="Hello\n")
    assert result.exit_code == code
    assert f"there is no adapter at {tmp_path / 'none'}" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_has_one_for_all_its_plans(trimtab_cli):
    words = ("serve", "--show-settings", "--plan", "full", "--plan", "kivi:bits=2")
    shown = trimtab_cli(*words, "--adapter", "mine")
    assert "adapter=mine" in shown.stdout and "cache=kivi:bits=2" in shown.stdout
    refused = trimtab_cli("serve", "--plan", "full", "--plan", "kivi:bits=2 adapter=mine")
    assert refused.exit_code == 2 and "the plans differ in adapter" in refused.stderr
