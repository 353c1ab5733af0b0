"""A request while it is worked on, and what the user gets of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from trimtab.decoding.processors import TokenCounts
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.decoding.stopping import StopChecker
from trimtab.errors import NumericsError, TrimtabError
from trimtab.kvcache.base import Sequence
from trimtab.models.detokenizer import Detokenizer

if TYPE_CHECKING:
    from trimtab.engine.constraining import TextForm


@dataclass(slots=True)
class RequestMetrics:
    """Where a request's time and memory went. Times in seconds, `token_times` counted from arrival."""

    arrival: float = field(default_factory=time.perf_counter)
    queue_s: float = 0.0
    ttft_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0  # taken over from an earlier text instead of computed
    kv_bytes_held: int = 0  # held when it was last computed, so at its end
    kv_bytes_peak: int = 0  # the most it held after any step
    kv_bytes_host: int = 0  # held besides in host memory when it was last computed
    preemptions: int = 0
    token_times: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float | None:
        """Generation rate after the first token; None for fewer than two tokens."""
        if len(self.token_times) < 2:
            return None
        return (len(self.token_times) - 1) / max(self.token_times[-1] - self.token_times[0], 1e-9)


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability of a token under the model itself, and the likeliest tokens with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Completion:
    """One generated text. `finish_reason`: stop, length, cancelled or error (then `error` says why)."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: str | int | None = None  # the stop text or stop token that was met
    error: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(slots=True)
class RequestOutput:
    """What `generate` returns for one prompt; the shortcuts are those of the first completion."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def metrics(self) -> RequestMetrics:
        return self.outputs[0].metrics


@dataclass(slots=True)
class ScoreOutput:
    """Teacher-forced log-probabilities of a continuation; `greedy[i]`: token i was the likeliest."""

    logprobs: list[float]
    greedy: list[bool]
    metrics: RequestMetrics


@dataclass(slots=True)
class Piece:
    """Text that became certain in one step of a stream; the last one has `finish_reason` and `metrics`."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    metrics: RequestMetrics | None = None
    logprobs: list[TokenLogprob] | None = None  # of `token_ids`, where they were asked for
    stop_reason: str | int | None = None


class State(Enum):
    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class Request:
    """One sequence of tokens on its way: known tokens, and how many of them are computed.

    `tokens` is the prompt and all that was generated. A scored request knows its continuation from the
    start (`scoring`), so nothing is sampled. `computed` tokens have their rows in the cache.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        seed: int,
        max_length: int,
        continuation: list[int] | None = None,
        index: int = 0,
    ) -> None:
        self.params = params
        self.seed = seed
        self.index = index
        self.tokens = prompt_ids + (continuation or [])
        self.prompt_length = len(prompt_ids)
        self.scoring = continuation is not None
        limit = max_length if params.max_tokens is None else self.prompt_length + params.max_tokens
        self.length_limit = min(max_length, limit)
        self.state = State.WAITING
        self.computed = 0
        self.sequence: Sequence | None = None
        self.form: TextForm | None = None  # what the text must look like
        self.after: Request | None = None  # start only when this one has computed that many tokens,
        self.after_tokens = 0  # to share its blocks
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.fault: type[TrimtabError] = NumericsError  # what `error` is raised as
        self.metrics = RequestMetrics(prompt_tokens=self.prompt_length)
        self.text_parts: list[str] = []
        self.unread = 0  # tokens not yet handed to a stream
        self.unread_text = ""
        self.detokenizer: Detokenizer | None = None
        self.stop = StopChecker(params.stop or (), params.include_stop_str_in_output)
        self.counts = TokenCounts(prompt_ids, ()) if params.has_penalties else None
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.scores: list[float] = []
        self.greedy: list[bool] = []
        self.cumulative_logprob = 0.0

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def target(self) -> int:
        """How many tokens have to be computed now; the last token of a scored text never needs to be."""
        return len(self.tokens) - 1 if self.scoring else len(self.tokens)

    @property
    def text(self) -> str:
        return "".join(self.text_parts)

    @property
    def held_back(self) -> bool:
        """Whether the text may still be taken back, so that nobody should see it yet."""
        return self.form is not None and self.form.holds_back and self.state is not State.FINISHED

    def shorten(self, keep: int) -> None:
        """Take back all but the first `keep` generated tokens."""
        kept = self.output_ids[:keep]
        del self.tokens[self.prompt_length + keep :]
        del self.logprobs[keep:]
        del self.metrics.token_times[keep:]
        self.unread = keep
        self.text_parts, self.unread_text = [], ""
        self.cumulative_logprob = sum(x.logprob for x in self.logprobs)
        if self.counts is not None:
            self.counts = TokenCounts(self.tokens[: self.prompt_length], kept)
        if self.detokenizer is not None:
            self.detokenizer.flush()
            for token in kept:
                self.emit(self.detokenizer.push(token))

    def emit(self, text: str) -> None:
        if text:
            self.text_parts.append(text)
            self.unread_text += text

    def take(self) -> Piece:
        """What has come since this was last asked."""
        new = self.unread
        ids = self.tokens[len(self.tokens) - new :] if new else []
        done = self.state is State.FINISHED
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = self.logprobs[len(self.logprobs) - new :] if new else []
        piece = Piece(
            self.unread_text,
            ids,
            self.finish_reason,
            self.metrics if done else None,
            logprobs,
            self.stop_reason,
        )
        self.unread, self.unread_text = 0, ""
        return piece

    def finish(self, reason: str, error: str | None = None) -> None:
        self.finish_reason = reason
        self.error = error
        self.state = State.FINISHED
        self.metrics.completion_tokens = len(self.tokens) - self.prompt_length

    def completion(self) -> Completion:
        wants = self.params.logprobs is not None
        return Completion(
            index=self.index,
            text=self.text,
            token_ids=self.output_ids,
            logprobs=self.logprobs if wants else None,
            cumulative_logprob=self.cumulative_logprob if wants else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
            metrics=self.metrics,
        )
