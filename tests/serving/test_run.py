"""Starting and stopping a server: addresses, what answers while the model loads, and real processes."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from trimtab.errors import ConfigError
from trimtab.serving.address import is_local, listen, url_of
from trimtab.serving.front import Front
from trimtab.serving.metrics import Metrics


def test_port_0_takes_a_free_port_and_says_which():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert port > 0
        assert url_of(sock) == f"http://127.0.0.1:{port}"
        assert is_local(sock)
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass


def test_an_address_for_all_is_shown_as_one_that_can_be_opened():
    with listen("0.0.0.0", 0) as sock:
        assert url_of(sock, "/llm") == f"http://127.0.0.1:{sock.getsockname()[1]}/llm"
        assert not is_local(sock)


def test_a_port_in_use_is_one_sentence():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^port {port} on 127.0.0.1 is in use; choose another"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("no.such.host.invalid", "host is 'no.such.host.invalid', which is no known address"),
        ("192.0.2.1", "host is '192.0.2.1', which is no address of this machine"),
        ("x" * 300, "which is no known address"),
    ],
)
def test_a_bad_host_is_one_sentence(host, message):
    with pytest.raises(ConfigError) as caught:
        listen(host, 0)
    assert message in str(caught.value)


def ask(front, path):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(front({"type": "http", "method": "GET", "path": path, "headers": []}, None, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_while_it_loads_it_says_so_and_has_metrics():
    front = Front(Metrics(["tiny"]), "/llm")
    assert ask(front, "/health") == (503, b'{"status":"loading"}')
    status, body = ask(front, "/v1/models")
    assert (status, json.loads(body)["error"]["code"]) == (503, "not_ready")
    for path in ("/metrics", "/llm/metrics"):
        status, body = ask(front, path)
        assert status == 200 and b"trimtab_ready 0.0" in body


def test_once_loaded_the_app_answers():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"app"})

    front = Front(Metrics(["tiny"]))
    front.app = app
    assert ask(front, "/health") == (200, b"app")
    assert b"trimtab_ready" in ask(front, "/metrics")[1]
