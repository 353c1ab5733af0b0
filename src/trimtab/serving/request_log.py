"""The request log: one JSON line for each request, to stderr or a file.

Lines are written by a thread of their own, so that neither a slow disk nor a pipe that nobody reads holds up
the event loop, and a disk that is full costs log lines, never requests.
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.serving.observe import RequestRecord

_MOST_WAITING = 10_000  # lines; more are dropped, and counted


class RequestLog:
    """Writes a line for each `RequestRecord` it is called with.

    Args:
        path: the file to append to; None: stderr. A file that is moved away (log rotation) is opened anew.
        prompts: whether the prompt is written too.

    Raises ConfigError if the file cannot be opened.
    """

    def __init__(self, path: str | None = None, *, prompts: bool = False) -> None:
        self._path = path
        self._prompts = prompts
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._file = -1
        self._broken = False  # whether the last line could not be written
        self._torn = False  # whether the file ends within a line
        self.lost = 0
        try:
            self._reopen()
        except OSError as error:
            raise ConfigError(f"log_file is {path!r}, which cannot be written: {error.strerror}") from None
        self._thread = threading.Thread(target=self._run, name="trimtab-request-log", daemon=True)
        self._thread.start()

    def __call__(self, record: RequestRecord) -> None:
        """Queue the line of a finished request; never waits, never raises for want of room."""
        try:
            self._lines.put_nowait(self._line(record))
        except queue.Full:
            self.lost += 1

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is queued, for at most `timeout_s` seconds, and end."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _line(self, record: RequestRecord) -> bytes:
        values: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": record.id,
            "client": record.client,
            "route": record.route,
            "model": record.model,
            "status": record.status,
            "stream": record.stream,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "cached_tokens": record.cached_tokens,
            "queue_s": _rounded(record.queue_s),
            "ttft_s": _rounded(record.ttft_s),
            "total_s": _rounded(record.total_s),
            "finish_reasons": record.finish_reasons,
            "error": record.error,
        }
        if self._prompts:
            values["prompt"] = record.prompt
        # Escaped to ASCII: a line break of any alphabet within a text never ends the line.
        return json.dumps(values, default=str).encode() + b"\n"

    # --- the writing thread

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                if self._path is not None:
                    self._reopen()
                self._write(b"\n" + line if self._torn else line)
                self._broken = False
            except OSError as error:
                self.lost += 1
                if not self._broken:
                    self._warn(error)
                self._broken = True
            self._lines.task_done()
        if self._path is not None:
            os.close(self._file)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]
            self._torn = bool(data)

    def _reopen(self) -> None:
        """Open the file, unless it is open and still the one that the path names."""
        if self._path is None:
            self._file = 2
            return
        if self._file >= 0:
            ours = os.fstat(self._file)
            try:
                there = os.stat(self._path)
            except FileNotFoundError:
                there = None
            if there is not None and (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return
        opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._torn = opened, False

    def _warn(self, error: OSError) -> None:
        try:
            where = self._path or "stderr"
            print(
                f"the request log cannot be written to {where} ({error.strerror}); requests go on without it",
                file=sys.stderr,
                flush=True,
            )
        except OSError:  # stderr itself is what cannot be written
            pass


def _rounded(value: float | None) -> float | None:
    """Seconds to the microsecond; what is not a number is not valid JSON."""
    return None if value is None or not math.isfinite(value) else round(value, 6)
