"""What a source of training data is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from trimtab.training.data.segments import Segment


class Source(ABC):
    """An endless stream of segments whose whole state is a small dict.

    The stream is a pure function of the seed: a source restored to a state goes on with the very segments
    that the first one would have given.
    """

    @abstractmethod
    def next(self) -> Segment:
        """The next segment."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where the stream is, as JSON values."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go to `state`."""
