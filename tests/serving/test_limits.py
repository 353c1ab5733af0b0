"""What a request passes before a route: keys, body sizes, cross-origin rules, a proxy's path."""

from __future__ import annotations

import asyncio
import json

import pytest

from trimtab.serving.limits import wrap
from trimtab.serving.settings import ServerSettings


async def echo(scope, receive, send):
    """An app that answers with the path it was asked for and the length of the body."""
    message = await receive()
    assert not message.get("more_body")
    answer = json.dumps([scope["path"], scope.get("root_path", ""), len(message.get("body", b""))]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer})


def call(app, path="/v1/x", method="POST", headers=(), body=(b"",), events=()):
    """Status, headers and JSON of one request; `body` is what comes in how many parts."""
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in dict(headers).items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": raw}
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    if parts:
        parts[-1]["more_body"] = False
    incoming = [*parts, *events]
    sent = []

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    if not sent:
        return None
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    text = b"".join(message["body"] for message in sent[1:])
    return sent[0]["status"], found, json.loads(text) if text.startswith((b"{", b"[")) else text


@pytest.fixture
def limited():
    return wrap(echo, ServerSettings(max_body=100))


def announced(size):
    return {"content-length": str(size)}


def test_a_body_within_the_limit_arrives_whole(limited):
    assert call(limited, headers=announced(100), body=[b"x" * 60, b"x" * 40])[::2] == (
        200,
        ["/v1/x", "", 100],
    )
    assert call(limited, headers={"transfer-encoding": "chunked"}, body=[b"x" * 50] * 2)[2][2] == 100
    assert call(limited, method="GET")[0] == 200


@pytest.mark.parametrize(
    ("headers", "body", "size"),
    [
        (announced(101), [b"x" * 101], " of 101 B"),
        ({"transfer-encoding": "chunked"}, [b"x" * 30] * 4, ""),
        ({"transfer-encoding": "chunked"}, [b"x" * 401, b"never read"], ""),
        ({**announced(10**12), "expect": "100-continue"}, [], " of 931.3 GiB"),
    ],
)
def test_a_body_beyond_the_limit_is_413(limited, headers, body, size):
    status, found, answer = call(limited, headers=headers, body=body)
    assert status == 413
    assert found["connection"] == "close"
    assert answer["error"] == {
        "message": f"the request body{size} is larger than 100 B; send less at once",
        "type": "invalid_request_error",
        "param": None,
        "code": "body_too_large",
    }


def test_what_is_too_large_is_not_kept():
    """The refused body is read in parts and dropped; memory never holds more than the limit."""
    seen = []

    async def app(scope, receive, send):
        seen.append("called")

    incoming = [{"type": "http.request", "body": b"x" * 50, "more_body": True} for _ in range(1000)]
    left = iter(incoming)

    async def receive():
        return next(left)

    async def send(message):
        seen.append(message["type"])

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"transfer-encoding", b"chunked")]}
    asyncio.run(wrap(app, ServerSettings(max_body=100))(scope, receive, send))
    assert seen == ["http.response.start", "http.response.body"]
    assert 980 < len(list(left)) < 1000  # four times the limit was read, no more


def test_a_client_that_leaves_within_its_body_gets_no_answer(limited):
    assert call(limited, headers=announced(90), body=[], events=[{"type": "http.disconnect"}]) is None


def test_the_route_sees_the_client_leave_after_the_body(limited):
    seen = []

    async def app(scope, receive, send):
        seen.extend([await receive(), await receive()])

    call(
        wrap(app, ServerSettings()),
        headers=announced(2),
        body=[b"{}"],
        events=[{"type": "http.disconnect"}],
    )
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]
    assert seen[0]["body"] == b"{}"


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "an API key is missing"),
        ({"authorization": "Bearer "}, "an API key is missing"),
        ({"authorization": "Bearer wrong"}, "the API key is wrong"),
        ({"authorization": "Bearer one two"}, "the API key is wrong"),
        ({"authorization": "Basic one"}, "the API key is wrong"),
        ({"authorization": "Bearer \xff\xfe"}, "the API key is wrong"),
    ],
)
def test_without_a_key_it_is_401(headers, message):
    app = wrap(echo, ServerSettings(api_key=("one", "two")))
    status, found, answer = call(app, headers=headers)
    assert (status, found["www-authenticate"]) == (401, "Bearer")
    assert answer["error"]["message"].startswith(message)
    assert answer["error"]["code"] == "invalid_api_key"
    assert "one" not in answer["error"]["message"]


@pytest.mark.parametrize("key", ["one", "two"])
def test_each_key_opens(key):
    app = wrap(echo, ServerSettings(api_key=("one", "two")))
    assert call(app, headers={"authorization": f"Bearer {key}"})[0] == 200
    assert call(app, headers={"authorization": f"bearer {key}"})[0] == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [("/health", 200), ("/", 200), ("/v1", 401), ("/v1/", 401), ("/v10", 200), ("/llm/v1/models", 401)],
)
def test_the_key_guards_v1_alone_also_under_a_root_path(path, status):
    app = wrap(echo, ServerSettings(api_key="k", root_path="/llm"))
    assert call(app, path=path)[0] == status


def test_no_body_is_read_for_a_stranger():
    app = wrap(echo, ServerSettings(api_key="k"))
    assert call(app, headers={"transfer-encoding": "chunked"}, body=[])[0] == 401


def test_routes_learn_the_root_path():
    assert call(wrap(echo, ServerSettings(root_path="/llm")))[2] == ["/v1/x", "/llm", 0]
    assert call(wrap(echo, ServerSettings()))[2] == ["/v1/x", "", 0]


def test_browsers_of_other_origins_get_in_only_when_asked_for():
    asked = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    closed = wrap(echo, ServerSettings())
    assert "access-control-allow-origin" not in call(closed, headers=asked)[1]
    app = wrap(echo, ServerSettings(cors_origins="https://a.example", api_key="k"))
    status, found, _ = call(app, method="OPTIONS", headers=asked)  # a preflight carries no key
    assert (status, found["access-control-allow-origin"]) == (200, "https://a.example")
    assert "authorization" in found["access-control-allow-headers"]
    status, found, _ = call(app, headers={"origin": "https://a.example"})
    assert (status, found["access-control-allow-origin"]) == (401, "https://a.example")
    assert call(app, method="OPTIONS", headers={**asked, "origin": "https://b.example"})[0] == 400
