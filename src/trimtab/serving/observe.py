"""What is known of a finished HTTP request, for whoever counts or logs it.

`app.state.observers` is a list of functions; each is called with one `RequestRecord` when a request to
`/v1/completions` or `/v1/chat/completions` has ended, however it ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.engine.request import RequestMetrics

log = logging.getLogger("trimtab.serving")


@dataclass(slots=True)
class RequestRecord:
    """One finished request. Times in seconds.

    Attributes:
        model: the name that was asked for; None where the body did not get so far.
        status: the HTTP status; 499 if the client left. A stream that failed on the way keeps its 200 and
            has `error`.
        queue_s, ttft_s: until the first of its texts was started, and until the first token of any.
        inter_token_s: the time between neighbouring tokens, over all its texts.
        error: the message that the client was sent.
        prompt: the prompt's text (of several, joined by newlines), decoded only when it is asked for.
    """

    id: str
    route: str
    client: str | None
    model: str | None = None
    status: int = 200
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    inter_token_s: list[float] = field(default_factory=list)
    read_prompt: Callable[[], str] = field(default=lambda: "", repr=False)

    @property
    def prompt(self) -> str:
        return self.read_prompt()


Observer = Callable[[RequestRecord], None]


def gaps(metrics: Iterable[RequestMetrics]) -> list[float]:
    """The times between neighbouring tokens of each text."""
    found: list[float] = []
    for one in metrics:
        times = one.token_times
        found += [later - earlier for earlier, later in pairwise(times)]
    return found


def tell(observers: Iterable[Observer], record: RequestRecord) -> None:
    """Call every observer; one that fails is logged and disturbs nobody."""
    for observer in observers:
        try:
            observer(record)
        except Exception:
            log.exception("an observer of requests failed")
