"""`trimtab serve` up to the point where a server would run."""

from __future__ import annotations

import socket

import pytest

from trimtab.serving import run


@pytest.fixture
def served(monkeypatch):
    """The settings that a server was started with."""
    found = []
    monkeypatch.setattr(run, "serve", lambda settings: found.append(settings) or 0)
    return found


def test_flags_reach_the_server(trimtab_cli, served, monkeypatch):
    monkeypatch.setenv("TRIMTAB_API_KEY", "k1")
    monkeypatch.setenv("TRIMTAB_SERVE_MAX_QUEUE", "7")
    words = ["m", "--plan", "full", "--plan", "kivi:bits=2", "--kv-memory", "64MiB", "--threads", "1"]
    words += ["--no-playground", "--log-prompts", "--cors-origin", "https://a.example", "--max-body", "1MiB"]
    assert trimtab_cli("serve", *words).exit_code == 0
    (settings,) = served
    assert [(p.model, p.kv_memory, p.threads) for p in settings.plans] == [("m", 64 << 20, 1)] * 2
    assert (settings.playground, settings.log_prompts, settings.log_requests) == (False, True, True)
    assert (settings.api_key, settings.cors_origins) == (("k1",), ("https://a.example",))
    assert (settings.max_queue, settings.max_body) == (7, 1 << 20)


def test_its_exit_code_is_the_server_s(trimtab_cli, monkeypatch):
    monkeypatch.setattr(run, "serve", lambda settings: 3)
    assert trimtab_cli("serve").exit_code == 3


def test_showing_settings_starts_nothing(trimtab_cli, served):
    result = trimtab_cli("serve", "--show-settings", "--port", "1234")
    assert (result.exit_code, served) == (0, [])
    assert "port: 1234  # on the command line\n" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "error: on the command line: port is 99999; it must be a whole number"),
        (["--config", "nothing.yaml"], "error: cannot read the settings 'nothing.yaml': No such file"),
        (["--plan", "kivy"], "unknown cache method 'kivy'. Did you mean 'kivi'"),
        (["--request-timeout", "soon"], "request_timeout is 'soon'; write seconds"),
        (["--log-file", "x", "--no-log-requests"], "log_file has no effect while log_requests is off"),
        (["--host", "no.such.host.invalid"], "host is 'no.such.host.invalid', which is no known address"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(trimtab_cli, words, message):
    result = trimtab_cli("serve", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line(trimtab_cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = trimtab_cli("serve", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "is in use; choose another with --port (0: a free one)" in result.stderr
