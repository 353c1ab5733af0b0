"""What a request passes before it reaches a route: cross-origin rules, the API key, the size of its body.

Plain ASGI, not Starlette's `BaseHTTPMiddleware`: that one puts a task and a queue between server and route,
which costs time for every chunk of a stream and hides that a client has gone.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.sizes import format_bytes

if TYPE_CHECKING:
    from trimtab.serving.settings import ServerSettings

PROTECTED = "/v1"
_PATIENCE = 4  # bodies up to so many times the limit are read and thrown away before they are refused


def wrap(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """`app` behind the limits that the settings ask for."""
    app = BodyLimit(app, settings.max_body)
    if settings.api_key:
        app = ApiKey(app, settings.api_key)
    if settings.cors_origins:
        # Outside the key: a browser's preflight has none, and must be able to read a 401.
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    return RootPath(app, settings.root_path) if settings.root_path else app


class RootPath:
    """Tells the routes under which path a proxy publishes them, whether it strips that path or not."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "root_path": self._root_path}
        await self._app(scope, receive, send)


class ApiKey:
    """Answers 401 under `/v1` unless the request carries one of the keys as `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_protected(scope):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._knows(key.strip()):
                what = "the API key is wrong" if key else "an API key is missing"
                message = f"{what}; send the header 'Authorization: Bearer KEY'"
                extra = [(b"www-authenticate", b"Bearer")]
                await refuse(send, 401, message, code="invalid_api_key", headers=extra)
                return
        await self._app(scope, receive, send)

    def _knows(self, key: str) -> bool:
        given = key.encode("utf-8", "surrogateescape")
        # All keys are compared, so that the time tells neither which one nor how much of it was right.
        return sum(hmac.compare_digest(given, known) for known in self._keys) > 0

    @staticmethod
    def _is_protected(scope: Scope) -> bool:
        path, root = scope["path"], scope.get("root_path", "")
        # The router takes a path with or without the root path; so does the guard.
        return any(p == PROTECTED or p.startswith(PROTECTED + "/") for p in (path, path.removeprefix(root)))


class BodyLimit:
    """Answers 413 to a body of more than `limit` bytes, whether its length is announced or only shows.

    The body is read before the route is called: a route then never starts on half a request, and the size of
    a chunked body is known while it can still be refused.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        announced = int(headers.get("content-length", 0))  # the HTTP parser has refused what is no number
        if announced > self._limit and headers.get("expect", "").lower() == "100-continue":
            await self._too_large(send, announced)  # a client that asks first is spared the sending
            return
        if not announced and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        body = bytearray()
        size, more = 0, True
        while more and size <= _PATIENCE * self._limit:
            message = await receive()
            if message["type"] != "http.request":  # gone before it had said all
                return
            size += len(message.get("body", b""))
            # What is too large is read for a while still: most clients see no answer before all is sent.
            if max(size, announced) <= self._limit:
                body += message.get("body", b"")
            more = message.get("more_body", False)
        if size > self._limit:
            await self._too_large(send, announced)
            return
        first = True

        async def replay() -> Message:
            nonlocal first, body
            if not first:
                return await receive()
            first, whole, body = False, bytes(body), bytearray()
            return {"type": "http.request", "body": whole, "more_body": False}

        await self._app(scope, replay, send)

    async def _too_large(self, send: Send, announced: int) -> None:
        size = f" of {format_bytes(announced)}" if announced else ""
        message = f"the request body{size} is larger than {format_bytes(self._limit)}; send less at once"
        # The rest of the body may be on its way still; nothing else can follow on this connection.
        close = [(b"connection", b"close")]
        await refuse(send, 413, message, code="body_too_large", headers=close)


async def refuse(
    send: Send,
    status: int,
    message: str,
    *,
    code: str,
    kind: str = "invalid_request_error",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Answer with an error object as OpenAI writes it."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error}, ensure_ascii=False).encode()
    always = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*always, *headers]})
    await send({"type": "http.response.body", "body": body})
