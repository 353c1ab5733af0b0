"""What is at the socket from the first moment, before there is a model to serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab.serving.limits import refuse
from trimtab.serving.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from trimtab.serving.metrics import Metrics


class Front:
    """What is at the socket from the start: the metrics, and 503 until there is an app to hand over to."""

    def __init__(self, metrics: Metrics, root_path: str = "") -> None:
        self.app: ASGIApp | None = None
        self._metrics = metrics
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(self._root_path)
        if path == "/metrics" and scope["method"] in ("GET", "HEAD"):
            await _answer(send, 200, CONTENT_TYPE, self._metrics.text())
        elif self.app is not None:
            await self.app(scope, receive, send)
        elif path == "/health":
            await _answer(send, 503, "application/json", b'{"status":"loading"}')
        else:
            message = "the server is still loading; try again soon"
            later = [(b"retry-after", b"1")]
            await refuse(send, 503, message, code="not_ready", kind="service_unavailable", headers=later)


async def _answer(send: Send, status: int, kind: str, body: bytes) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
