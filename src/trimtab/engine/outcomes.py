"""What becomes of logits: a score for a token that is known, a new token for a request that is caught up.

Also where a request ends: at an end token, a stop text or token, or its length.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trimtab.decoding.sampler import Row, Sampled, Sampler, as_numpy, raw_logprobs
from trimtab.engine.constraining import Constraining, TextForm
from trimtab.engine.request import Request, TokenLogprob
from trimtab.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.engine.scheduler import Pick, Scheduler
    from trimtab.kernels.native import Library


class Outcomes:
    def __init__(
        self, scheduler: Scheduler, eos_ids: frozenset[int], vocab_size: int, library: Library | None = None
    ) -> None:
        self._scheduler = scheduler
        self._constraining = Constraining(vocab_size)
        self._eos_ids = eos_ids
        self._sampler = Sampler(library)

    def wanted(self, picks: list[Pick]) -> tuple[list[int], list[tuple[Request, int]]]:
        """Rows whose logits are needed, and for each its request and the index of the token it predicts.

        Masks for them begin to be filled: they are needed only when the model has run.
        """
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
        self._constraining.start(owners)
        return rows, owners

    def use(self, logits: Tensor, owners: list[tuple[Request, int]]) -> list[Request]:
        """Take each wanted row's logits to its request; returns the requests that got a token or ended."""
        sampled_rows: list[int] = []
        rows: list[Row] = []
        requests: list[Request] = []
        touched: list[Request] = []
        masks = self._constraining.masks()
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
                    mask=masks.get(i),
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
        elif request.form is not None and not self._advance(request, request.form, token):
            return
        elif request.form is not None and request.form.state.stopped:
            ended = "stop"
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
        if ended == "stop" and request.held_back and self._rejected(request):
            return
        if ended is not None:
            if request.held_back:
                metrics.ttft_s = now - metrics.arrival  # nobody saw anything before
            self._scheduler.finish(request, ended)
        elif request.form is not None and params.logprobs is None and params.num_samples == params.n:
            self._take_forced(request, request.form, now)

    def _advance(self, request: Request, form: TextForm, token: int) -> bool:
        """Take a token into the request's constraint; where that fails the request ends."""
        if form.state.advance(token):
            return True
        request.fault = RequestError
        reason = form.state.error or f"token {token} was drawn, which it does not allow"
        self._scheduler.finish(request, "error", f"the constraint could not be followed: {reason}")
        return False

    def _take_forced(self, request: Request, form: TextForm, now: float) -> None:
        """Append the tokens that alone are allowed next: they need no drawing, and are computed together."""
        room = request.length_limit - len(request.tokens) - 1
        for token in form.state.forced_tokens()[: max(room, 0)]:
            if token in self._eos_ids or not form.state.advance(token) or form.state.stopped:
                raise AssertionError("a forced token must be followed by another")
            request.tokens.append(token)
            request.unread += 1
            if request.counts is not None:
                request.counts.add(token)
            request.metrics.token_times.append(now - request.metrics.arrival)
            if request.detokenizer is not None:
                request.emit(request.detokenizer.push(token))

    def _rejected(self, request: Request) -> bool:
        """Whether a finished text is not what was asked for and is written again."""
        form = request.form
        assert form is not None
        reason = form.check(request.text)
        if reason is None:
            return False
        keep = form.reject(request.output_ids, request.seed)
        if keep is not None:
            self._scheduler.rewind(request, keep)
            return True
        request.stop_reason = f"no valid text was found in {form.tries} tries; the last one: {reason}"
        self._scheduler.finish(request, "length")
        return True
