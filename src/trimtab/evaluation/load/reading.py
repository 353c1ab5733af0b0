"""From an answer's bytes and their times to tokens and theirs; runs when the measurement is over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trimtab.evaluation.load.client import Exchange


@dataclass(slots=True)
class Answer:
    """One answered (or failed) request; times in seconds, latencies since the scheduled arrival.

    `chunk_times` are clock times of chunks that brought tokens, `chunk_tokens` how many each brought. Servers
    that tell neither token ids nor running counts get the total spread evenly over the chunks (`counted` is
    False then).
    """

    scheduled: float
    lag: float  # sent so much later than scheduled: the client's fault
    ended: float
    error: str | None = None
    chunk_times: list[float] = field(default_factory=list)
    chunk_tokens: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    counted: bool = True
    extras: dict[str, Any] | None = None  # what trimtab's own server tells

    @property
    def ttft(self) -> float | None:
        return self.chunk_times[0] - self.scheduled if self.chunk_times else None

    @property
    def e2e(self) -> float:
        return self.ended - self.scheduled

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [b - a for a, b in zip(self.chunk_times, self.chunk_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first chunk."""
        tokens = sum(self.chunk_tokens[1:])
        return (self.chunk_times[-1] - self.chunk_times[0]) / tokens if tokens else None


def read(exchange: Exchange, stream: bool) -> Answer:
    """What an exchange amounts to. A stream must end with `[DONE]`, or it was cut off."""
    answer = Answer(
        exchange.scheduled, exchange.begun - exchange.scheduled, exchange.ended, error=exchange.error
    )
    if answer.error is None and exchange.status != 200:
        answer.error = _refusal(exchange)
    if answer.error is None:
        try:
            _read_stream(exchange, answer) if stream else _read_whole(exchange, answer)
        except (ValueError, KeyError, TypeError, AttributeError):
            answer.error = "not the answer of an OpenAI-compatible server"
    return answer


def _refusal(exchange: Exchange) -> str:
    try:
        found = json.loads(exchange.body)["error"]
        return f"{exchange.status}: {found['message']}"
    except (ValueError, KeyError, TypeError):
        return str(exchange.status)


def _read_whole(exchange: Exchange, answer: Answer) -> None:
    body = json.loads(exchange.body)
    _usage(body["usage"], answer)
    answer.extras = body.get("trimtab")


def _usage(usage: dict[str, Any], answer: Answer) -> None:
    answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _read_stream(exchange: Exchange, answer: Answer) -> None:
    ids: list[int] = []
    running: list[int] = []
    ended = False
    for at, data in events(exchange.parts):
        if data == b"[DONE]":
            ended = True
            break
        chunk = json.loads(data)
        if "error" in chunk:
            answer.error = f"in the stream: {chunk['error'].get('message')}"
            return
        answer.extras = chunk.get("trimtab") or answer.extras
        if chunk.get("usage"):
            _usage(chunk["usage"], answer)
        if _brings_text(chunk):
            answer.chunk_times.append(at)
            ids.append(sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"]))
            if chunk.get("usage"):
                running.append(answer.output_tokens or 0)
    if not ended:
        answer.error = "the stream was cut off"
        return
    chunks = len(answer.chunk_times)
    if any(ids):
        answer.chunk_tokens = list(map(float, ids))
    elif len(running) == chunks:
        answer.chunk_tokens = [float(b - a) for a, b in zip([0, *running], running, strict=False)]
    elif answer.output_tokens is not None and chunks:
        answer.chunk_tokens = [answer.output_tokens / chunks] * chunks
        answer.counted = answer.output_tokens == chunks
    else:
        answer.chunk_tokens, answer.counted = [1.0] * chunks, False
    if answer.output_tokens is None:
        answer.output_tokens = round(sum(answer.chunk_tokens))


def _brings_text(chunk: dict[str, Any]) -> bool:
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        if (
            choice.get("token_ids")
            or choice.get("text")
            or any(delta.get(key) for key in ("content", "reasoning_content", "tool_calls"))
        ):
            return True
    return False


def events(parts: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of server-sent events, each with the time at which it was whole."""
    rest = b""
    for at, data in parts:
        *whole, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield at, b"\n".join(lines)
