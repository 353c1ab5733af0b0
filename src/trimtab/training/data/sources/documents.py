"""Documents of a token store in windows, in a new order every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.errors import ConfigError
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source
from trimtab.training.data.token_store import TokenStore


class Documents(Source):
    """Every document cut into windows of at most `window` tokens, all windows shuffled together.

    `first` (the tokenizer's bos, say) begins every window that does not begin with it already, and counts.
    With `window=None` a document is one segment, of whatever length. The cut moves by a random offset
    every epoch, so that a token is not always at the same place of its window.

    The order of an epoch is a pure function of the seed and the epoch's number. It takes 8 bytes a window:
    1e8 windows (5e10 tokens in windows of 512) are 0.8 GB; beyond, use several sources.
    """

    def __init__(self, store: TokenStore, window: int | None, seed: int, first: int | None = None) -> None:
        if window is not None and window < 2 + (first is not None):
            raise ConfigError(
                f"'window' is {window}; a window needs at least {2 + (first is not None)} tokens"
            )
        self.store, self.window, self.seed, self.first = store, window, seed, first
        self.epoch, self.cursor = 0, 0
        self._open(0)

    def _open(self, epoch: int) -> None:
        """The order of an epoch's windows, which are numbered through all documents."""
        rng = np.random.default_rng((self.seed, epoch))
        lengths = np.diff(self.store.ends, prepend=0)
        self._room, self._shift = 0, 0
        counts = np.ones_like(lengths)
        if self.window is not None:
            self._room = self.window - (self.first is not None)
            # An epoch with a shift begins each document with a window of `shift` tokens.
            self._shift = int(rng.integers(self._room)) if epoch else 0
            after = np.maximum(lengths - self._shift, 0)
            counts = -(-after // self._room) + (self._shift > 0)
        self._last = counts.cumsum()  # of each document, the number of its last window, plus one
        self._order = rng.permutation(int(self._last[-1]))
        self.epoch = epoch

    def __len__(self) -> int:
        """Windows of this epoch."""
        return len(self._order)

    def next(self) -> Segment:
        if self.cursor == len(self._order):
            self._open(self.epoch + 1)
            self.cursor = 0
        self.cursor += 1
        return self.numbered(int(self._order[self.cursor - 1]))

    def numbered(self, number: int) -> Segment:
        """The window of that number in the order of the documents."""
        document = int(np.searchsorted(self._last, number, side="right"))
        begin = int(self.store.ends[document - 1]) if document else 0
        end = int(self.store.ends[document])
        if self.window is not None:
            within = number - (int(self._last[document - 1]) if document else 0)
            base = begin - (self._room - self._shift if self._shift else 0)
            end = min(end, base + (within + 1) * self._room)
            begin = max(begin, base + within * self._room)
        cut = self.store.cut(begin, end, document)
        if self.first is None or cut.tokens[0] == self.first:
            return cut
        tokens = np.concatenate((np.array([self.first], cut.tokens.dtype), cut.tokens))
        return Segment(tokens, np.concatenate(([False], cut.trained)), cut.label)

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor, "tokens": len(self.store.tokens)}

    def restore(self, state: dict[str, Any]) -> None:
        held = len(self.store.tokens)
        if state.get("tokens", held) != held:  # older checkpoints do not say
            raise ConfigError(
                f"the token store {self.store.folder} has {held:,} tokens, and the checkpoint was written "
                f"with {state['tokens']:,}: the data changed since; put it back, or start a new run"
            )
        self._open(state["epoch"])
        if state["cursor"] > len(self._order):
            raise ConfigError(
                f"the checkpoint is at window {state['cursor']} of {self.store.folder}, which has only "
                f"{len(self._order)}: the data or 'window' changed since; start a new run"
            )
        self.cursor = state["cursor"]
