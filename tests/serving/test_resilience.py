"""Real server processes and what befalls them: signals, crashes, clients that leave, disks that fill."""

from __future__ import annotations

import json
import signal
import socket
import time

import pytest

from serving.process import PATIENCE_S, Served, events

pytestmark = pytest.mark.slow


def until(condition, what):
    """Wait for a condition; the bound is only there to end a test that fails."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server():
    with Served("--plan", "full", "--plan", "kivi:bits=2", "--max-queue", "1000") as running:
        yield running.wait_ready()


def test_it_says_what_it_serves_and_answers(server):
    server.wait_for(f"is ready at http://127.0.0.1:{server.port}$")
    server.wait_for("model tiny +plan full$")
    server.wait_for("model tiny:kivi:bits=2 +plan cache=kivi:bits=2$")
    assert server.ask("GET", "/health")[0] == 200
    _, body = server.ask("GET", "/v1/models")
    assert [model["id"] for model in json.loads(body)["data"]] == ["tiny", "tiny:kivi:bits=2"]
    for name in ("tiny", "tiny:kivi:bits=2"):
        body = {"model": name, "prompt": "Once", "max_tokens": 3}
        assert server.ask("POST", "/v1/completions", body)[0] == 200


def test_a_request_is_logged_without_its_prompt_and_counted(server):
    before = server.gauge("generation_tokens_total")
    asked = {"model": "tiny", "prompt": "a secret wish", "max_tokens": 5, "ignore_eos": True}
    answer = json.loads(server.ask("POST", "/v1/completions", asked)[1])
    assert server.gauge("generation_tokens_total") == before + 5
    line = json.loads(server.wait_for(f".*{answer['id']}.*")[0])
    assert (line["status"], line["completion_tokens"], line["finish_reasons"]) == (200, 5, ["length"])
    assert "secret" not in "\n".join(server.lines)


def test_two_hundred_clients_that_leave_midway_leave_nothing_behind(server):
    clients = [server.open_stream(max_tokens=1500, prompt=f"Tale {i}.") for i in range(200)]
    started = [answer.readline() for _, answer in clients[:16]]  # the others may still be waiting
    assert all(line.startswith(b"data: ") for line in started)
    assert server.gauge("kv_bytes_held") > 0
    for connection, answer in clients:
        connection.sock and connection.sock.shutdown(socket.SHUT_RDWR)
        answer.close()
        connection.close()
    names = ("num_requests_running", "num_requests_waiting", "kv_bytes_held")
    until(lambda: [server.gauge(name) for name in names] == [0, 0, 0], "no request and no block is left")
    assert server.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "On", "max_tokens": 2})[0] == 200


def test_a_client_that_leaves_before_the_answer_is_let_go(server):
    """Not streamed: nothing is written until the end, and still the work stops."""
    connection = server.connect()
    asked = json.dumps({"model": "tiny", "prompt": "On", "max_tokens": 1900, "n": 16, "ignore_eos": True})
    connection.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
    until(lambda: server.gauge("num_requests_running") > 0, "the request runs")
    before = server.gauge("generation_tokens_total")
    connection.close()
    until(lambda: server.gauge("num_requests_running") == 0, "the request is gone")
    assert server.gauge("kv_bytes_held") == 0
    # 16 texts of 1900 tokens were asked for; far fewer were made.
    assert server.gauge("generation_tokens_total") - before < 16 * 1900


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_running_stream_come_to_its_end(number):
    with Served() as server:
        server.wait_ready()
        _, answer = server.open_stream(max_tokens=600, stream_options={"include_usage": True})
        assert answer.readline().startswith(b"data: ")
        server.process.send_signal(number)
        server.wait_for("stopping; what is under way has 30 s to end")
        until(lambda: _refused(server.port), "no further connection is taken")
        rest = events(answer)
        assert rest[-1] == "[DONE]"
        assert rest[-2]["usage"]["completion_tokens"] == 600
        assert server.ended() == 0


def _refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_what_outlasts_the_drain_is_told_and_cancelled():
    with Served("--drain-timeout", "200ms", "--stream-interval", "0") as server:
        server.wait_ready()
        _, answer = server.open_stream(max_tokens=1900, n=32)
        assert answer.readline().startswith(b"data: ")
        assert server.stop(signal.SIGTERM) == 0
        rest = events(answer)
        assert "shutting down" in rest[-1]["error"]["message"] or "shutting down" in json.dumps(rest[-2])


def test_a_second_signal_ends_it_at_once():
    with Served() as server:
        server.wait_ready()
        _, answer = server.open_stream(max_tokens=1900, n=64)
        assert answer.readline().startswith(b"data: ")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        assert server.stop(signal.SIGTERM) == 128 + signal.SIGTERM


def test_a_signal_while_it_loads_ends_it():
    with Served() as server:
        server.wait_listening()
        assert server.stop(signal.SIGTERM) == 0
        assert not any("Traceback" in line for line in server.lines)


def test_it_listens_while_it_loads():
    with Served() as server:
        server.wait_listening()
        assert server.ask("GET", "/health") == (503, b'{"status":"loading"}')
        assert server.ask("GET", "/metrics")[0] == 200
        server.wait_ready()
        assert server.ask("GET", "/health")[0] == 200


def test_killed_and_started_again_it_serves_on_the_same_port():
    with Served() as first:
        first.wait_ready()
        _, answer = first.open_stream(max_tokens=1900)
        answer.readline()
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    with Served(port=first.port) as second:
        second.wait_ready()
        assert second.port == first.port
        assert second.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "On"})[0] == 200


def test_a_full_disk_does_not_stop_it():
    with Served("--log-file", "/dev/full") as server:
        server.wait_ready()
        for _ in range(3):
            asked = {"model": "tiny", "prompt": "On", "max_tokens": 1}
            assert server.ask("POST", "/v1/completions", asked)[0] == 200
        assert server.stop(signal.SIGTERM) == 0
        assert sum("request log cannot be written" in line for line in server.lines) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/folder"], "error: there is no folder 'no/such/folder'"),
        (["--cache", "kivi:bits=2,group_size=7"], "error: "),
        (["--host", "192.0.2.1"], "error: host is '192.0.2.1', which is no address of this machine"),
        (["--log-file", "/no/such/folder/log"], "error: log_file is '/no/such/folder/log'"),
    ],
)
def test_what_cannot_start_is_one_sentence_and_exit_code_2(words, message):
    with Served(*words) as server:
        assert server.ended() == 2
        assert server.lines[-1].startswith(message)
        assert not any("Traceback" in line for line in server.lines)
