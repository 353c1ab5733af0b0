"""Documents of a token store in windows, in a new order every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source
from trimtab.training.data.token_store import TokenStore

class Documents(Source):
    """Every document cut into windows of at most `window` tokens, all windows shuffled together.

    `first` (the tokenizer's bos, say) begins every window that does not begin with it already, and counts.
    With `window=None` a document is one segment, of whatever length. The cut moves by a random offset
    every epoch, so that a token is not always at the same place of its window.
    """

    def __init__(self, store: TokenStore, window: int | None, seed: int, first: int | None = None) -> None:
        self.store, self.window, self.seed, self.first = store, window, seed, first
        self.epoch, self.cursor = 0, 0
        self._open(0)

    def _open(self, epoch: int) -> None:
        """The windows of an epoch: `_starts`, `_ends`, `_documents` in the order they are given out."""
        rng = np.random.default_rng((self.seed, epoch))
        ends = self.store.ends
        begins = np.concatenate(([0], ends[:-1]))
        if self.window is None:
            cuts = [np.array([begin]) for begin in begins]
        else:
            room = self.window - (self.first is not None)
            shift = int(rng.integers(room)) if epoch else 0
            cuts = [_cuts(int(b), int(e), room, shift) for b, e in zip(begins, ends, strict=True)]
        starts = np.concatenate(cuts)
        documents = np.repeat(np.arange(len(ends)), [len(c) for c in cuts])
        stops = np.append(starts[1:], ends[-1])
        order = rng.permutation(len(starts))
        self._starts, self._ends, self._documents = starts[order], stops[order], documents[order]
        self.epoch = epoch

    def next(self) -> Segment:
        if self.cursor == len(self._starts):
            self._open(self.epoch + 1)
            self.cursor = 0
        at = self.cursor
        self.cursor += 1
        cut = self.store.cut(int(self._starts[at]), int(self._ends[at]), int(self._documents[at]))
        if self.first is None or cut.tokens[0] == self.first:
            return cut
        tokens = np.concatenate((np.array([self.first], cut.tokens.dtype), cut.tokens))
        return Segment(tokens, np.concatenate(([False], cut.trained)), cut.label)

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        self._open(state["epoch"])
        self.cursor = state["cursor"]


def _cuts(begin: int, end: int, room: int, shift: int) -> np.ndarray:
    """Where the windows of one document begin."""
    later = np.arange(begin + shift, end, room)
    return np.concatenate(([begin], later)) if shift else later
