"""A stream of server-sent events as a bare ASGI response.

Starlette's `StreamingResponse` runs a task group and an iterator for each response; here every look at the
ticket is one write, and a timer sends comments while nothing comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trimtab.serving.errors import ApiError, dump, to_api_error

if TYPE_CHECKING:
    from trimtab.serving.call import Chunks
    from trimtab.serving.guard import Guard
    from trimtab.serving.ticket import Ticket

KEEP_ALIVE = b": keep-alive\n\n"


class EventStream(Response):
    """Sends what a ticket brings.

    Args:
        ticket: a live one.
        chunks: writes its updates.
        watch: begins to watch the client, given the connection's `receive`.
        ended: called once when all is over, with the error that the client was sent, if any, and whether the
            client had left.
    """

    keep_alive_s: ClassVar[float] = 15.0

    def __init__(
        self,
        ticket: Ticket,
        chunks: Chunks[Any],
        watch: Callable[[Receive], Guard],
        ended: Callable[[ApiError | None, bool], None],
        headers: dict[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        self._ticket = ticket
        self._chunks = chunks
        self._watch = watch
        self._ended = ended
        # Without X-Accel-Buffering nginx would hold the chunks back.
        fixed = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.init_headers({"Content-Type": "text/event-stream; charset=utf-8"} | fixed | headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ticket, chunks = self._ticket, self._chunks
        guard = self._watch(receive)
        beat = _Heartbeat(send, self.keep_alive_s)
        error: ApiError | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            beat.start()
            async for updates in ticket:
                data = chunks.write(updates)
                if data:
                    await beat.send(data)
            if guard.late:
                raise guard.error
            if not guard.gone:
                await beat.send(chunks.finish())
        except OSError:  # the connection broke while it was written to
            guard.leave()
        except Exception as failure:
            error = to_api_error(failure)
            await beat.send(b"data: " + dump(error.body) + b"\n\n")
        finally:
            beat.stop()
            guard.stop()
            ticket.cancel()
            self._ended(error, guard.gone)
            # Whatever still refers to this response must not keep its texts alive.
            del self._ticket, self._chunks, self._watch, self._ended
        if not guard.gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Heartbeat:
    """Sends a comment whenever nothing was sent for a while, so that no proxy thinks the stream dead."""

    def __init__(self, send: Send, every_s: float) -> None:
        self._send = send
        self._every_s = every_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        self._last = 0.0
        self._busy = False

    def start(self) -> None:
        self._last = self._loop.time()
        self._timer = self._loop.call_later(self._every_s, self._beat)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._sending is not None:
            self._sending.cancel()

    async def send(self, data: bytes) -> None:
        self._busy = True
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            self._busy = False
            self._last = self._loop.time()

    def _beat(self) -> None:
        left = self._last + self._every_s - self._loop.time()
        if left <= 0 and not self._busy:
            # A comment that cannot be sent means that the client has gone, which the guard sees by itself.
            self._sending = self._loop.create_task(self._comment())
            left = self._every_s
        self._timer = self._loop.call_later(max(left, 0.1), self._beat)

    async def _comment(self) -> None:
        with suppress(OSError):
            await self.send(KEEP_ALIVE)
