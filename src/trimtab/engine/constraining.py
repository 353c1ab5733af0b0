"""Keeps texts to the form that was asked for: masks before sampling, and another try where a finished text
turns out wrong.

A mask depends on the known tokens alone, so masks are filled while the model runs. A constraint whose mask
allows too much (`Constraint.exact` is False) holds its text back until `check` has accepted it; a rejected
text goes back to one of the places where it had a choice, and must choose otherwise there.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trimtab.decoding.randomness import Purpose, uniform

if TYPE_CHECKING:
    from trimtab.decoding.constraints.base import Constraint, ConstraintState, Mask
    from trimtab.engine.request import Request

MAX_TRIES = 64
MAX_CHECK_S = 1.0  # all texts wait while one is checked
_HAND_OVER_S = 2e-4  # filling that takes longer than this goes to a thread of its own


class _Place:
    """One place of the tree of texts tried so far."""

    __slots__ = ("avoided", "next", "spent", "width")

    def __init__(self) -> None:
        self.width = 1  # how many tokens the mask allows here
        self.spent: set[int] = set()  # tokens below which every text was tried
        self.avoided: set[int] = set()  # tokens that should give way to others for now
        self.next: dict[int, _Place] = {}


class TextForm:
    """One request's constraint: its state, and where the mask allows too much, the texts tried so far."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self.state: ConstraintState = constraint.start()
        self.tries = 1
        self.check_s = 0.0  # spent on checking finished texts
        self._path = [_Place()]

    @property
    def holds_back(self) -> bool:
        """Whether the text is shown only when it is finished and accepted."""
        return not self.constraint.exact

    def check(self, text: str) -> str | None:
        """Why a finished text is not what was asked for; None when it is."""
        begin = time.perf_counter()
        reason = self.constraint.check(text)
        self.check_s += time.perf_counter() - begin
        return reason

    def narrow(self, output: list[int], mask: Mask) -> None:
        """Take what was tried already after `output` out of a filled mask, which is never emptied by that."""
        place = self._follow(output)
        words = mask.view(np.uint32)
        place.width = int(np.bitwise_count(words).sum())
        for token in place.spent:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        left = place.width - len(place.spent)
        if left > len(place.avoided - place.spent):
            for token in place.avoided:
                words[token // 32] &= ~np.uint32(1 << token % 32)
        else:
            place.avoided.clear()

    def reject(self, output: list[int], seed: int) -> int | None:
        """Never write `output` again. Returns how many of its tokens to keep, for another way on from there;
        None when every text was tried, or enough of them.
        """
        self._follow(output[:-1])
        places = self._path[: len(output)]
        for place, token in zip(reversed(places), reversed(output), strict=True):
            place.spent.add(token)
            place.next.pop(token, None)
            if len(place.spent) < place.width:
                break
        open_places = [i for i, place in enumerate(places) if len(place.spent) < place.width]
        if not open_places or self.tries >= MAX_TRIES or self.check_s > MAX_CHECK_S:
            return None
        self.tries += 1
        # Anywhere: what is wrong may lie at the beginning, and to try all endings first would take for ever.
        keep = open_places[int(uniform(seed, self.tries, Purpose.RETRY) * len(open_places))]
        places[keep].avoided.add(output[keep])
        del self._path[keep + 1 :]
        self.state = self.constraint.start()
        self.state.advance_many(output[:keep])
        return keep

    def _follow(self, output: list[int]) -> _Place:
        while len(self._path) <= len(output):
            token = output[len(self._path) - 1]
            self._path.append(self._path[-1].next.setdefault(token, _Place()))
        return self._path[len(output)]


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
        if self._job is not None:  # of a step that failed before it took its masks
            wait([self._job])
            self._job = None
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
