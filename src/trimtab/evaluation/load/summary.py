"""What a run's answers come to: counts, rates, percentiles, goodput."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.evaluation.load.reading import Answer
from trimtab.evaluation.load.slo import Slo

LATE_S = 0.010  # a request sent so much after its time counts as late ...
LATE_SHARE = 0.01  # ... and so large a share of them means that the client could not keep the schedule


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds; None where nothing was measured."""

    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """One rate (or one closed loop). See `docs/bench-serve.md` for what each figure means."""

    kind: str  # "open" or "closed"
    rate: float | None  # offered, requests/s
    clients: int | None
    seconds: float
    sent: int
    done: int
    errors: dict[str, int]
    achieved_rate: float
    output_tokens_per_s: float
    prompt_tokens: float | None  # means of a request
    output_tokens: float | None
    ttft: Quantiles
    itl_chunk: Quantiles
    itl_token: Quantiles
    e2e: Quantiles
    tokens_per_chunk: float | None
    counted: bool  # False: tokens of a chunk are a guess
    goodput: float
    good: int
    lag: Quantiles
    late: int
    client_cpu: float
    notes: tuple[str, ...] = field(default=())

    @property
    def kept_schedule(self) -> bool:
        """Whether the client sent (nearly) all requests at their time."""
        return self.late <= LATE_SHARE * self.sent


def quantiles(values: Sequence[float], weights: Sequence[float] | None = None) -> Quantiles:
    """Quantiles of `values`; with `weights`, as if each stood there so many times."""
    import numpy as np

    if not len(values):
        return Quantiles()
    if weights is None:
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        return Quantiles(float(np.mean(values)), float(p50), float(p95), float(p99), float(np.max(values)))
    order = np.argsort(values)
    ordered, weight = np.asarray(values, dtype=float)[order], np.asarray(weights, dtype=float)[order]
    below = np.cumsum(weight)
    at = np.searchsorted(below, np.array([0.5, 0.95, 0.99]) * below[-1])
    p50, p95, p99 = ordered[np.minimum(at, len(ordered) - 1)]
    mean = float((ordered * weight).sum() / below[-1])
    return Quantiles(mean, float(p50), float(p95), float(p99), float(ordered[-1]))


def summarise(
    answers: Sequence[Answer],
    start: float,
    seconds: float,
    slo: Slo,
    *,
    rate: float | None = None,
    clients: int | None = None,
    client_cpu: float = 0.0,
) -> Summary:
    """The figures of the window of `seconds` from `start` (clock time).

    Throughput is of what came in the window, whenever it was asked for. The rest, at a `rate`: of requests
    scheduled in the window, however long they took. In a closed loop (`clients`): of requests under way in
    it, and of their gaps those that ended in it, because afterwards there are ever fewer clients.
    """
    end = start + seconds
    if rate is not None:
        counted = [a for a in answers if start <= a.scheduled < end]
    else:
        counted = [a for a in answers if a.ended >= start and a.scheduled < end]
    done = [a for a in counted if a.error is None]
    streamed = [a for a in done if a.chunk_times]
    good = sum(slo.kept(_times(a)) for a in done)
    between = [
        (gap, tokens)
        for a in streamed
        for at, gap, tokens in zip(a.chunk_times[1:], a.gaps, a.chunk_tokens[1:], strict=True)
        if rate is not None or start <= at < end
    ]
    paced = [(gap / tokens, tokens) for gap, tokens in between if tokens > 0]
    chunks = sum(len(a.chunk_times) for a in streamed)
    every = all(a.counted for a in streamed)
    in_window = [a for a in answers if a.error is None and start <= a.ended < end]
    late = sum(a.lag > LATE_S for a in counted)
    failed = Counter(a.error for a in counted if a.error is not None)
    return Summary(
        kind="open" if rate is not None else "closed",
        rate=rate,
        clients=clients,
        seconds=seconds,
        sent=len(counted),
        done=len(done),
        errors=dict(failed.most_common()),
        achieved_rate=len(in_window) / seconds,
        output_tokens_per_s=_tokens_between(answers, start, end) / seconds,
        prompt_tokens=_mean([a.prompt_tokens for a in done]),
        output_tokens=_mean([a.output_tokens for a in done]),
        ttft=quantiles([a.ttft for a in streamed if a.ttft is not None]),
        itl_chunk=quantiles([gap for gap, _ in between]),
        itl_token=quantiles([pace for pace, _ in paced], [tokens for _, tokens in paced]),
        e2e=quantiles([a.e2e for a in done]),
        tokens_per_chunk=sum(sum(a.chunk_tokens) for a in streamed) / chunks if chunks else None,
        counted=every,
        goodput=good / seconds,
        good=good,
        lag=quantiles([a.lag for a in counted]),
        late=late,
        client_cpu=client_cpu,
        notes=_notes(len(counted), len(failed), late, every, client_cpu),
    )


def _times(answer: Answer) -> dict[str, float | None]:
    gaps = answer.gaps
    return {
        "ttft": answer.ttft,
        "tpot": answer.tpot,
        "itl": quantiles(gaps).p99 if gaps else None,
        "e2e": answer.e2e,
    }


def _tokens_between(answers: Sequence[Answer], start: float, end: float) -> float:
    """Tokens that came in the window; those of an answer that was not streamed come at its end."""
    total = 0.0
    for a in answers:
        if a.chunk_times:
            total += sum(n for at, n in zip(a.chunk_times, a.chunk_tokens, strict=False) if start <= at < end)
        elif start <= a.ended < end:
            total += a.output_tokens or 0
    return total


def _mean(values: Sequence[Any]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _notes(sent: int, failed: int, late: int, counted: bool, client_cpu: float) -> tuple[str, ...]:
    notes = []
    if not sent:
        notes.append("no request arrived in the window; measure longer or at a higher rate")
    if late > LATE_SHARE * sent:
        notes.append(
            f"the client sent {late} of {sent} requests more than {1e3 * LATE_S:.0f} ms late: it could not "
            "keep the schedule, and the latencies (which count from the schedule) are partly its own"
        )
    if client_cpu > 0.9:
        notes.append(f"the client used {client_cpu:.0%} of a core: it may be what limits the rate")
    if failed:
        notes.append("latencies are of the requests that succeeded")
    if not counted:
        notes.append("the server does not tell the tokens of a chunk; they are spread evenly over the chunks")
    return tuple(notes)
