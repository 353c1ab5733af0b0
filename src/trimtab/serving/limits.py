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
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdecimal() and int(announced) > self._limit:
            await self._too_large(send, f" of {format_bytes(int(announced))}")
            return
        if not announced and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # gone before it had said all
                return
            part = message.get("body", b"")
            size += len(part)
            if size > self._limit:
                await self._too_large(send, "")
                return
            parts.append(part)
            more = message.get("more_body", False)
        body = b"".join(parts)
        parts.clear()
        unread = True

        async def replay() -> Message:
            nonlocal unread, body
            if not unread:
                return await receive()
            unread, whole, body = False, body, b""
            return {"type": "http.request", "body": whole, "more_body": False}

        await self._app(scope, replay, send)

    async def _too_large(self, send: Send, size: str) -> None:
        message = f"the request body{size} is larger than {format_bytes(self._limit)}; send less at once"
        # The rest of the body is still on its way; nothing else can follow on this connection.
        close = [(b"connection", b"close")]
        await refuse(send, 413, message, code="body_too_large", headers=close)


async def refuse(
    send: Send, status: int, message: str, *, code: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with an error object as OpenAI writes it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}, ensure_ascii=False).encode()
    always = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*always, *headers]})
    await send({"type": "http.response.body", "body": body})
