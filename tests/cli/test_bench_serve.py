"""`bench serve`: mistakes are one sentence before anything starts, and results go where they should."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from evaluation.load.fake_server import FakeServer

BRIEF = ["--rates", "30", "--duration", "200ms", "--warmup", "0s", "--slo", "ttft=10s"]


@pytest.fixture
def fake_url():
    """The address of a fake server in another thread."""
    server, loop, started = FakeServer(), asyncio.new_event_loop(), threading.Event()

    async def main():
        async with server:
            started.set()
            await stopped.wait()

    stopped = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert started.wait(10)
    yield server.url
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    loop.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rates", "fast"], "--rates is 'fast'; write requests a second"),
        (["--duration", "0s"], "--duration is 0; give it more than zero"),
        (["--warmup", "soon"], "--warmup is 'soon'; write a duration"),
        (["--slo", "tft=1s"], "--slo has no bound 'tft'. Did you mean"),
        (["--lengths", "out=3"], "--lengths has no setting 'out'."),
        (["--prompts", "none.jsonl"], "--prompts 'none.jsonl' cannot be read"),
        (["--plain", "--ignore-eos"], "--plain sends no ignore_eos"),
        (["--url", "http://x", "--cache", "full"], "so --cache has no effect; leave it out"),
        (["some/model", "--url", "http://x"], "so MODEL has no effect; leave it out"),
        (["--serve", "'"], '--serve is "\'", which cannot be split'),
        (["--url", "ftp://x"], "--url is 'ftp://x'; write an address"),
        (["--cache", "kivy"], "kivy"),
    ],
)
def test_mistakes_are_one_sentence(trimtab_cli, words, message):
    result = trimtab_cli("bench", "serve", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert result.stdout == ""


def test_a_running_server_is_measured(trimtab_cli, fake_url, tmp_path):
    result = trimtab_cli("bench", "serve", "--url", fake_url, *BRIEF, "--out", str(tmp_path / "load"))
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][:4] == ["load", "sent", "done", "errors"]
    assert lines[1][0] == lines[4][0] == "30/s"
    assert lines[3][:2] == ["load", "TTFT"]
    assert lines[1][1] == lines[1][2] != "0"
    (row,) = [json.loads(line) for line in (tmp_path / "load" / "results.jsonl").read_text().splitlines()]
    assert (row["rate"], row["seconds"], row["settings"]["model"]) == (30, 0.2, "fake")
    assert row["ttft"]["p50"] > 0 and row["versions"]["trimtab"]
    assert {f.name for f in (tmp_path / "load").iterdir()} == {"results.jsonl", "load.html", "load.svg"}


def test_json_is_one_line(trimtab_cli, fake_url):
    result = trimtab_cli("bench", "serve", "--url", fake_url, "--json", *BRIEF)
    (row,) = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert row["errors"] == {}


def test_nobody_there_is_an_error(trimtab_cli):
    from trimtab.evaluation.load.server import free_port

    result = trimtab_cli("bench", "serve", "--url", f"127.0.0.1:{free_port()}", *BRIEF)
    assert result.exit_code == 2
    assert "does not answer: no connection" in result.stderr


def test_a_model_may_be_called_like_the_default_command(trimtab_cli):
    result = trimtab_cli("bench", "speed", "--backend", "torch")
    assert result.exit_code == 2
    assert "'speed'" in result.stderr


def test_errors_speak_of_bench(trimtab_cli):
    result = trimtab_cli("bench", "--nope")
    assert result.exit_code == 2
    assert "Usage: trimtab bench [OPTIONS] [MODEL]" in result.stderr
