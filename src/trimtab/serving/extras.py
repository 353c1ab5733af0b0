"""Token counts, and the `trimtab` object: what one request cost in time and in KV memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.engine.request import RequestMetrics
    from trimtab.serving.models import ServedModel
    from trimtab.serving.ticket import Ticket


def usage(ticket: Ticket) -> dict[str, Any]:
    """OpenAI's `usage`, also while the request runs: each prompt once, and every text that was made."""
    prompt = sum(group[0].metrics.prompt_tokens for group in ticket.groups)
    completion = completion_tokens(ticket)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens(ticket)},
    }


def completion_tokens(ticket: Ticket) -> int:
    return sum(len(metrics.token_times) for metrics in ticket.metrics)


def cached_tokens(ticket: Ticket) -> int:
    """Prompt tokens that were taken over from earlier requests instead of computed.

    Of one prompt's texts the first computes what the others take over, which does not count.
    """
    return sum(group[0].metrics.cached_prompt_tokens for group in ticket.groups)


def extras(ticket: Ticket, served: ServedModel, notes: list[str]) -> dict[str, Any]:
    """The object `trimtab` of a response, or of a stream so far. docs/api.md says what each entry is."""
    metrics = ticket.metrics
    return {
        "plan": served.plan,
        "queue_s": _rounded(queue_s(metrics)),
        "ttft_s": _rounded(ttft_s(metrics)),
        "tokens_per_s": _rounded(tokens_per_s(metrics)),
        "cached_prompt_tokens": cached_tokens(ticket),
        "kv_bytes_held": sum(one.kv_bytes_held for one in metrics),
        "kv_bytes_peak": sum(one.kv_bytes_peak for one in metrics),
        "preemptions": sum(one.preemptions for one in metrics),
        "notes": notes,
    }


def queue_s(metrics: list[RequestMetrics]) -> float:
    """The time until the first of the texts was started."""
    return min((one.queue_s for one in metrics if one.queue_s), default=0.0)


def ttft_s(metrics: list[RequestMetrics]) -> float | None:
    """The time to the first token of any of the texts."""
    return min((one.ttft_s for one in metrics if one.ttft_s is not None), default=None)


def tokens_per_s(metrics: list[RequestMetrics]) -> float | None:
    """All texts' tokens after their first, over the time from the first token to the last."""
    begun = [one for one in metrics if one.token_times]
    count = sum(len(one.token_times) - 1 for one in begun)
    if not count:
        return None
    first = min(one.arrival + one.token_times[0] for one in begun)
    last = max(one.arrival + one.token_times[-1] for one in begun)
    return count / max(last - first, 1e-9)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
