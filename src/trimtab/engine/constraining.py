"""Keeps texts to the form that was asked for: masks before sampling, and another try where a finished text
turns out wrong.

A mask depends on the known tokens alone, so masks are filled while the model runs. A constraint whose mask
allows too much (`Constraint.exact` is False) holds its text back until `check` has accepted it; a rejected
text goes back to one of the places where it had a choice, and must choose otherwise there.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trimtab.decoding.randomness import Purpose, uniform

if TYPE_CHECKING:
    from trimtab.decoding.constraints.base import Constraint, ConstraintState, Mask
    from trimtab.engine.request import Request

MAX_TRIES = 64
_HAND_OVER_S = 2e-4  # filling that takes longer than this goes to a thread of its own


class TextForm:
    """One request's constraint: its state, and for a mask that allows too much what was rejected so far."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self.state: ConstraintState = constraint.start()
        self.tries = 1
        self.choices: list[int] = []  # places in the output where more than one token was allowed
        self._forbidden: dict[tuple[int, ...], set[int]] = {}

    @property
    def holds_back(self) -> bool:
        """Whether the text is shown only when it is finished and accepted."""
        return not self.constraint.exact

    def narrow(self, output: list[int], mask: Mask) -> None:
        """Take rejected choices out of a filled mask, perhaps all; note whether there is a choice."""
        for token in self._forbidden.get(tuple(output), ()):
            mask[token // 32] &= ~np.int32(np.uint32(1 << token % 32).astype(np.int32))
        bits = int(np.bitwise_count(mask.view(np.uint32)).sum())
        if bits > 1 and (not self.choices or self.choices[-1] < len(output)):
            self.choices.append(len(output))

    def reject(self, output: list[int], seed: int) -> int | None:
        """Forbid one of the choices that led to `output`; returns how many of its tokens to keep, or None
        when there is nothing left to try."""
        places = [place for place in self.choices if place < len(output)]
        if not places or self.tries >= MAX_TRIES:
            return None
        self.tries += 1
        place = places[int(uniform(seed, self.tries, Purpose.RETRY) * len(places))]
        self._forbidden.setdefault(tuple(output[:place]), set()).add(output[place])
        self.choices = [p for p in places if p < place]
        self.state = self.constraint.start()
        self.state.advance_many(output[:place])
        return place


class Constraining:
    """Fills the masks of a step's constrained rows."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._thread: ThreadPoolExecutor | None = None
        self._last_s = 0.0
        self._job: Future[None] | None = None
        self._rows: list[tuple[int, Request]] = []
        self._masks: NDArray[np.int32] = np.empty((0, self._words), np.int32)
        self._limited: list[bool] = []

    def start(self, owners: list[tuple[Request, int]]) -> None:
        """Begin to fill masks for the rows from which constrained requests will draw their next token."""
        self._rows = [
            (i, request)
            for i, (request, token) in enumerate(owners)
            if request.form is not None and token == len(request.tokens)
        ]
        if not self._rows:
            return
        if len(self._rows) > len(self._masks):
            self._masks = np.empty((len(self._rows), self._words), np.int32)
        if self._last_s < _HAND_OVER_S:
            self._fill()
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="trimtab-masks")
        self._job = self._thread.submit(self._fill)

    def masks(self) -> dict[int, Mask]:
        """Row -> mask, for the rows where not every token is allowed."""
        if not self._rows:
            return {}
        if self._job is not None:
            self._job.result()
            self._job = None
        return {row: self._masks[i] for i, (row, _) in enumerate(self._rows) if self._limited[i]}

    def _fill(self) -> None:
        begin = time.perf_counter()
        forms = [request.form for _, request in self._rows if request.form is not None]
        states = [form.state for form in forms]
        masks = self._masks[: len(states)]
        if len({type(state) for state in states}) == 1:
            self._limited = type(states[0]).fill_many(states, masks)
        else:
            self._limited = [state.fill_mask(mask) for state, mask in zip(states, masks, strict=True)]
        for i, form in enumerate(forms):
            if form.holds_back:
                if not self._limited[i]:
                    masks[i] = -1
                    self._limited[i] = True
                form.narrow(self._rows[i][1].output_ids, masks[i])
        self._last_s = 0.5 * self._last_s + 0.5 * (time.perf_counter() - begin)
