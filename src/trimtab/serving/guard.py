"""Ends a request whose client has gone or whose time is over."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from trimtab.serving.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import Receive

    from trimtab.serving.ticket import Ticket


class Guard:
    """Watches one ticket until `stop`; cancels it if the client goes or `seconds` are over.

    Attributes:
        gone: the client has left.
        late: the time is over.
    """

    def __init__(self, ticket: Ticket, receive: Receive, seconds: float | None, limit: float | None) -> None:
        self.gone = False
        self.late = False
        self._ticket: Ticket | None = ticket
        self._limit = limit
        self._watcher = asyncio.create_task(self._watch(receive))
        loop = asyncio.get_running_loop()
        self._timer = None if seconds is None else loop.call_later(max(seconds, 0.0), self._expire)

    def stop(self) -> None:
        """Watch no longer."""
        self._watcher.cancel()
        # The cancelled task's traceback refers to this, and must not keep the ticket's texts alive.
        self._ticket = None
        if self._timer is not None:
            self._timer.cancel()

    def leave(self) -> None:
        """Note that the client has left."""
        self.gone = True
        self._end()

    @property
    def error(self) -> ApiError:
        """What to answer when the time is over."""
        return ApiError(504, f"this request was not finished within {self._limit:g} s; ask for fewer tokens")

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.leave()

    def _expire(self) -> None:
        self.late = True
        self._end()

    def _end(self) -> None:
        if self._ticket is not None:
            self._ticket.cancel()
