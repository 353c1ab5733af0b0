"""The request log: one JSON line a request, and no failure of it reaches a request."""

from __future__ import annotations

import json
import os

import pytest

from trimtab.errors import ConfigError
from trimtab.serving.observe import RequestRecord
from trimtab.serving.request_log import RequestLog


def record(**more):
    values = {
        "id": "cmpl-1",
        "route": "/v1/completions",
        "client": "127.0.0.1",
        "model": "tiny",
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "queue_s": 0.00012345678,
        "finish_reasons": ["stop"],
        "read_prompt": lambda: "my secret\u2028plan",
    }
    return RequestRecord(**{**values, **more})


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_has_what_is_known_and_no_prompt(tmp_path):
    file = tmp_path / "log.jsonl"
    log = RequestLog(str(file))
    log(record())
    log(record(id="cmpl-2", status=400, ttft_s=float("nan"), model=None, error="max_tokens is -1\nno"))
    log.close()
    first, second = lines(file)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "id": "cmpl-1",
        "client": "127.0.0.1",
        "route": "/v1/completions",
        "model": "tiny",
        "status": 200,
        "stream": False,
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "queue_s": 0.000123,
        "ttft_s": None,
        "total_s": 0.0,
        "finish_reasons": ["stop"],
        "error": None,
    }
    assert (second["status"], second["ttft_s"], second["error"]) == (400, None, "max_tokens is -1\nno")
    assert "secret" not in file.read_text(encoding="utf-8")


def test_prompts_are_written_when_asked_for(tmp_path):
    file = tmp_path / "log.jsonl"
    log = RequestLog(str(file), prompts=True)
    log(record())
    log.close()
    assert [line["prompt"] for line in lines(file)] == ["my secret\u2028plan"]


def test_stderr_is_the_default(capfd):
    log = RequestLog()
    log(record())
    log.close()
    assert json.loads(capfd.readouterr().err)["id"] == "cmpl-1"


def test_it_appends_and_follows_a_rotation(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"id": "old"}\n')
    log = RequestLog(str(file))
    log(record(id="a"))
    log._lines.join()
    file.rename(tmp_path / "log.1")
    log(record(id="b"))
    log.close()
    assert [line["id"] for line in lines(tmp_path / "log.1")] == ["old", "a"]
    assert [line["id"] for line in lines(file)] == ["b"]


def test_a_file_that_cannot_be_opened_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"log_file is .*, which cannot be written: No such file"):
        RequestLog(str(tmp_path / "no" / "log.jsonl"))


def test_a_full_disk_costs_lines_and_one_warning(capfd):
    log = RequestLog("/dev/full")
    for _ in range(3):
        log(record())
    log.close()
    assert log.lost == 3
    assert capfd.readouterr().err == (
        "the request log cannot be written to /dev/full (No space left on device); "
        "requests go on without it\n"
    )


def test_it_goes_on_when_there_is_room_again(tmp_path, monkeypatch, capfd):
    """The disk takes half a line, then nothing, then all: what is there afterwards is whole lines."""
    file = tmp_path / "log.jsonl"
    log = RequestLog(str(file))
    write, room = os.write, [10, 0, None]

    def little(fd, data):
        if fd != log._file:
            return write(fd, data)
        left = room.pop(0) if room else None
        if left == 0:
            raise OSError(28, "No space left on device")
        return write(fd, data[:left])

    monkeypatch.setattr("trimtab.serving.request_log.os.write", little)
    log(record(id="torn"))
    log._lines.join()
    log(record(id="whole"))
    log.close()
    torn, whole = file.read_text(encoding="utf-8").splitlines()
    assert len(torn) == 10 and json.loads(whole)["id"] == "whole"
    assert log.lost == 1


def test_a_writer_that_hangs_never_holds_up_requests(tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.serving.request_log._MOST_WAITING", 5)
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    log = RequestLog(str(fifo))
    for _ in range(2000):  # far more than a pipe that nobody reads takes in
        log(record())
    assert log.lost > 0
    log.close(timeout_s=0.1)
    os.close(reader)
