"""What becomes of logits: a score for a token that is known, a new token for a request that is caught up.

Also where a request ends: at an end token, a stop text or token, or its length.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trimtab.decoding.sampler import Row, Sampled, Sampler, as_numpy, raw_logprobs
from trimtab.engine.request import Request, TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.engine.scheduler import Pick, Scheduler


class Outcomes:
    def __init__(self, scheduler: Scheduler, eos_ids: frozenset[int]) -> None:
        self._scheduler = scheduler
        self._eos_ids = eos_ids
        self._sampler = Sampler()

    def wanted(self, picks: list[Pick]) -> tuple[list[int], list[tuple[Request, int]]]:
        """Rows whose logits are needed, and for each its request and the index of the token it predicts."""
        rows: list[int] = []
        owners: list[tuple[Request, int]] = []
        at = 0
        for pick in picks:
            request, end = pick.request, pick.request.computed + pick.count
            if request.scoring:
                first = max(request.computed + 1, request.prompt_length + len(request.scores))
            elif (
                request.params.prompt_logprobs is not None
                and len(request.prompt_logprobs) < request.prompt_length
            ):
                first = max(request.computed + 1, len(request.prompt_logprobs))
            else:
                first = len(request.tokens)
            for token in range(first, end + 1):
                rows.append(at + token - 1 - request.computed)
                owners.append((request, token))
            at += pick.count
        return rows, owners

    def use(self, logits: Tensor, owners: list[tuple[Request, int]]) -> list[Request]:
        """Take each wanted row's logits to its request; returns the requests that got a token or ended."""
        sampled_rows: list[int] = []
        rows: list[Row] = []
        requests: list[Request] = []
        touched: list[Request] = []
        for i, (request, token) in enumerate(owners):
            if token < len(request.tokens):
                self._score(request, token, logits[i])
                if request.scoring and token == len(request.tokens) - 1:
                    self._scheduler.finish(request, request.finish_reason or "length", request.error)
                    touched.append(request)
                continue
            sampled_rows.append(i)
            requests.append(request)
            params = request.params
            plain = params.is_plain_greedy and params.min_tokens == 0
            rows.append(
                Row(
                    params,
                    request.seed,
                    token,
                    prompt_ids=() if plain else request.tokens[: request.prompt_length],
                    output_ids=() if plain else request.tokens[request.prompt_length :],
                    counts=request.counts,
                    eos_ids=self._eos_ids,
                )
            )
        if rows:
            chosen = logits if len(rows) == logits.shape[0] else logits[sampled_rows]
            now = time.perf_counter()
            for i, (request, sampled) in enumerate(
                zip(requests, self._sampler.sample(chosen, rows), strict=True)
            ):
                self._append(request, sampled, chosen, i, now)
            touched += requests
        return touched

    def _score(self, request: Request, token: int, logits: Tensor) -> None:
        """Note the log-probability of a token that is known already."""
        known = request.tokens[token]
        values = as_numpy(logits)
        logprob, top = raw_logprobs(values, known, request.params.prompt_logprobs or 0)
        if logprob != logprob:
            request.error = (
                request.error or self._sampler.sample(logits[None], [Row(request.params, 0, 0)])[0].error
            )
        if request.scoring:
            request.scores.append(logprob)
            request.greedy.append(int(values.argmax()) == known)
        else:
            request.prompt_logprobs.append(TokenLogprob(known, logprob, top))

    def _append(self, request: Request, sampled: Sampled, logits: Tensor, row: int, now: float) -> None:
        """Take a sampled token into the request and see whether it ends there."""
        if sampled.error:
            self._scheduler.finish(request, "error", sampled.error)
            return
        token, params, metrics = sampled.token, request.params, request.metrics
        request.tokens.append(token)
        request.unread += 1
        if request.counts is not None:
            request.counts.add(token)
        metrics.token_times.append(now - metrics.arrival)
        if metrics.ttft_s is None:
            metrics.ttft_s = metrics.token_times[0]
        if params.logprobs is not None and sampled.logprob is not None:
            request.logprobs.append(TokenLogprob(token, sampled.logprob, sampled.top))
            request.cumulative_logprob += sampled.logprob
        elif params.num_samples > params.n:
            request.cumulative_logprob += raw_logprobs(as_numpy(logits[row]), token, 0)[0]
        ended = None
        if token in self._eos_ids and not params.ignore_eos:
            ended = "stop"
        elif params.stop_token_ids and token in params.stop_token_ids:
            ended, request.stop_reason = "stop", token
        if request.detokenizer is not None:
            text, met = request.stop.push(request.detokenizer.push(token))
            request.emit(text)
            if met is None and (ended or len(request.tokens) >= request.length_limit):
                text, met = request.stop.push(request.detokenizer.flush())
                request.emit(text if met is not None else text + request.stop.flush())
            if met is not None:
                ended, request.stop_reason = "stop", met
        if ended is None and len(request.tokens) >= request.length_limit:
            ended = "length"
        if ended is not None:
            self._scheduler.finish(request, ended)
