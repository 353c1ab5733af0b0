"""A user's mistake is one line and exit code 2; a traceback only for those who ask."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trimtab.cli import info

CALL = [sys.executable, "-c", "from trimtab.cli.main import main; main()"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generat", "x"], "No such command 'generat'. Did you mean 'generate'?"),
        (["frobnicate"], "No such command 'frobnicate'. Known: attach, bench, chat, compare"),
        (["generate", "x", "--temprature", "1"], "--temperature"),
        (["generate", "x", "--top-k", "many"], "--top-k"),
        (["--nothing"], "No such option: --nothing"),
        (["explain"], "Missing argument 'METHOD'"),
        (["generate", "model", "prompt", "more"], "unexpected extra argument"),
    ],
)
def test_a_wrong_call_shows_usage(trimtab_cli, words, message):
    result = trimtab_cli(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: trimtab")
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "no/such/folder/here"], "there is no folder 'no/such/folder/here'"),
        (["info", "--memory", "lots"], "--memory is 'lots'; write bytes"),
        (["methods", "cach"], "unknown seam 'cach'. Did you mean 'cache'?"),
        (["explain", "ful"], "unknown method 'ful'. Did you mean 'full'"),
        (["generate", "x", "--cache", "ful"], "unknown cache method 'ful'. Did you mean 'full'?"),
        (["generate", "x", "--cache", "full:bits=2"], "unknown option 'bits' of cache method 'full'"),
        (["generate", "x", "--plan", "none.yaml"], "cannot read the plan 'none.yaml'"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens is 0"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "x", "--logprobs", "1"], "--logprobs has no effect without --json; add --json"),
        (["generate", "x", "--prompt-logprobs", "1"], "--prompt-logprobs has no effect without --json"),
        (["generate", "x", "--system", "s"], "--system has no effect without --chat; add --chat"),
        (["generate", "x", "--logit-bias", "4"], "--logit-bias is '4'; write KEY=VALUE"),
        (["generate", "x", "--logit-bias", "a=b"], "--logit-bias is 'a=b'; write TOKEN_ID=BIAS"),
        (["eval", "--task", "neddle"], "unknown task method 'neddle'. Did you mean 'needle'?"),
        (["compare", "--plan", "full", "--plan", "full"], "given twice"),
        (["bench", "--threads", "0"], "threads is 0; it must be a whole number of at least 1"),
    ],
)
def test_a_mistake_is_one_line(trimtab_cli, words, message):
    result = trimtab_cli(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_missing_prompt_is_told_apart_from_an_empty_pipe(trimtab_cli, monkeypatch):
    monkeypatch.setattr("trimtab.cli.common.is_piped", lambda: False)
    result = trimtab_cli("generate")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "a prompt is missing" in result.stderr


def test_debug_shows_where_it_happened(trimtab_cli):
    result = trimtab_cli("--debug", "info", "no/such/folder/here")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "hub.py" in result.stderr


def test_a_bug_keeps_its_traceback(trimtab_cli, monkeypatch):
    def broken(*args):
        raise AssertionError("ours")

    monkeypatch.setattr(info, "describe", broken)
    with pytest.raises(AssertionError, match="ours"):
        trimtab_cli("info")


def test_ctrl_c_exits_with_130(trimtab_cli, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "describe", interrupted)
    result = trimtab_cli("info")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("command", ["info", "methods"])
def test_a_reader_that_goes_away_is_no_error(command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*CALL, command], text=True, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 141
