"""The next batches made in a thread while the model computes."""

from __future__ import annotations

import queue
import threading
from typing import Any

from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source

_Item = tuple[list[Segment], dict[str, Any]] | BaseException
_WAIT = 0.1  # seconds between looks at whether to stop


class Prefetched:
    """The batches of a source, `ahead` of them made before they are asked for.

    A batch is as many segments as make at least `batch_tokens` tokens. Once the first batch was asked for,
    the source belongs to the thread: its own `state` runs ahead, and the state of the batch that was given
    out comes with it. So restore the source before. Close the object, or use it in `with`, to end the thread.
    """

    def __init__(self, source: Source, batch_tokens: int, ahead: int = 2) -> None:
        self.source, self.batch_tokens = source, batch_tokens
        self._made: queue.Queue[_Item] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def next_batch(self) -> tuple[list[Segment], dict[str, Any]]:
        """Segments, and the state of the source after them. Raises what the source raised."""
        assert not self._stop.is_set(), "closed"
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._thread = threading.Thread(target=self._make, name="trimtab-data", daemon=True)
            self._thread.start()
        item = self._made.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        """End the thread; batches made and not given out are lost, and made again after a restore."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        while not self._stop.is_set():
            try:
                item: _Item = self._batch()
            except BaseException as failure:
                item = failure
            while not self._stop.is_set():
                try:
                    self._made.put(item, timeout=_WAIT)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def _batch(self) -> tuple[list[Segment], dict[str, Any]]:
        segments: list[Segment] = []
        held = 0
        while held < self.batch_tokens:
            segments.append(self.source.next())
            held += len(segments[-1])
        return segments, self.source.state()
