"""The engine: prompts in, tokens out, many requests at once.

`step` is one turn of the wheel (schedule, run, commit, sample); everything else is a way to drive it. The
result of a request depends on its tokens, parameters and seed alone, never on what else is in the batch.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from trimtab.decoding.constraints.base import StructuredOutputs
from trimtab.decoding.randomness import child_seed, fresh_seed
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.engine.constraining import TextForm
from trimtab.engine.outcomes import Outcomes
from trimtab.engine.request import Piece, Request, RequestOutput, ScoreOutput, State
from trimtab.engine.runner import Runner
from trimtab.engine.scheduler import Scheduler
from trimtab.engine.setup import build_cache, choose_backend
from trimtab.errors import ConfigError, RequestError
from trimtab.models.detokenizer import Detokenizer
from trimtab.plan import Plan
from trimtab.registry import KV_CACHES, WEIGHTS

if TYPE_CHECKING:
    from trimtab.decoding.constraints.base import Constraint
    from trimtab.decoding.constraints.compiler import Compiler
    from trimtab.models.transformer import Model

Prompt = str | Sequence[int]


@dataclass(slots=True)
class EngineStats:
    """Counters since the last `reset_stats`, and the cache's bytes now."""

    steps: int
    tokens: int  # rows computed, prompts included
    kv_bytes_capacity: int
    kv_bytes_held: int
    kv_bytes_peak: int
    kv_bytes_cached: int
    kv_bytes_moved: int
    kv_bytes_fetched: int  # of those, what came from host memory to the device
    kv_bytes_host: int  # held in host memory; the others are the device's
    preemptions: int
    prefix_hit_tokens: int


class Engine:
    """Runs one model under one plan.

    Args:
        model: a loaded model, what names one (folder, hub id, shipped model), or None for the shipped `tiny`.
        options: the settings of `Plan` (cache, kv_memory, max_batch, max_step_tokens, prefix_caching,
            backend, threads). `kv_memory` None: what `max_batch` full contexts need, but at most a quarter of
            the free memory.

    Raises PlanError with every reason if the plan cannot run this model.
    """

    def __init__(
        self, model: Model | str | None = None, *, wait_for_kernels: bool = True, **options: Any
    ) -> None:
        plan = options.pop("plan", None) or Plan.from_dict(options)
        if model is None or isinstance(model, str):
            from trimtab.models.checkpoint import load

            name = model if model is not None else plan.model
            device = None if plan.device == "auto" else plan.device
            dtype = None if plan.dtype == "auto" else plan.dtype
            model = load(name, dtype=dtype, device=device or "cpu", adapter=plan.adapter)
        elif plan.adapter not in (None, model.adapter):
            raise ConfigError(
                f"adapter is {plan.adapter!r}, but the model handed in is loaded already; load it with "
                "trimtab.load(..., adapter=...)"
            )
        plan.check(model.config)
        self.plan = plan
        self.threads = plan.threads or len(os.sched_getaffinity(0))
        if plan.threads:
            torch.set_num_threads(plan.threads)
        # The policy's form of the model runs; `self.model` and what was fitted for it stay the base model.
        prepared = KV_CACHES.get(plan.cache.name).cls.prepare(model, plan.cache.options)
        running = WEIGHTS.get(plan.weights.name).cls.convert(prepared, plan.weights.options)
        # Of a policy without a form of its own nothing else needs the plain weights.
        self.model: Model = running if prepared is model else model
        kernels, native = choose_backend(running, plan.backend, self.threads, wait_for_kernels)
        self.backend = "torch" if native is None else "native"
        self.cache = build_cache(self.model, plan, kernels)
        # With dynamic rope scaling stored keys depend on the length of the text they were computed in.
        share = plan.prefix_caching and not model.rotary.length_dependent
        self.scheduler = Scheduler(self.cache, plan.max_batch, plan.max_step_tokens, share)
        self.runner = Runner(running, self.cache, native, plan.max_step_tokens, plan.max_batch)
        eos_ids = frozenset(model.config.eos_token_ids)
        if model.tokenizer is not None:
            eos_ids |= model.tokenizer.eos_ids
        self._eos_ids = eos_ids
        self.outcomes = Outcomes(
            self.scheduler, eos_ids, model.config.vocab_size, None if native is None else native.library
        )
        self.reset_stats()

    @classmethod
    def from_plan(cls, plan: Plan | str, model: Model | None = None) -> Engine:
        """An engine for a plan; its model is loaded unless one is given."""
        return cls(model, plan=Plan.of(plan))

    # --- requests in

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, _continuation: list[int] | None = None
    ) -> list[Request]:
        """Queue a prompt (text or token ids); one request for each of `params.num_samples` texts.

        Raises RequestError if it cannot be served: nothing is queued then.
        """
        params = params or SamplingParams()
        config = self.model.config
        ids = self._encode(prompt)
        params.check(config.vocab_size)
        constraint = self.compile(params.structured_outputs) if params.structured_outputs else None
        limit = config.context_length
        total = len(ids) + len(_continuation or ())
        # The last token of a text to score is predicted but never computed, so it may lie one beyond.
        most = limit if _continuation is None else limit + 1
        if total > most and not self.cache.endless:
            what = "prompt" if _continuation is None else "text to score"
            raise RequestError(
                f"the {what} has {total} tokens and the model's context is {limit}; shorten it"
            )
        if _continuation is None and total == limit and not self.cache.endless:
            raise RequestError(f"the prompt fills the model's context of {limit} tokens; no room to generate")
        max_length = limit
        if self.cache.endless and params.max_tokens is not None:
            max_length = max(limit, len(ids) + params.max_tokens)
        elif _continuation is None and total >= limit:
            raise RequestError(
                f"the prompt has {total} tokens and the model's context is {limit}; "
                "give max_tokens to go on beyond it"
            )
        seed = fresh_seed() if params.seed is None else params.seed
        requests = []
        tokenizer = self.model.tokenizer
        if tokenizer is not None and not tokenizer.available:
            tokenizer = None  # token ids in, token ids out
        for i in range(params.num_samples):
            request = Request(ids, params, child_seed(seed, i), max_length, _continuation, index=i)
            if tokenizer is not None and _continuation is None:
                request.detokenizer = Detokenizer(tokenizer, params.skip_special_tokens)
            elif params.stop:
                raise RequestError("stop texts need a tokenizer, and this model has none; use stop_token_ids")
            if constraint is not None:
                request.form = TextForm(constraint)
            if i and self.scheduler.prefix_caching:
                request.after, request.after_tokens = requests[0], len(ids)
            requests.append(request)
        for request in requests:
            self.scheduler.add(request)
        return requests

    def compile(self, wish: StructuredOutputs | Mapping[str, Any]) -> Constraint:
        """The constraint for `SamplingParams.structured_outputs`, compiled once and then kept.

        May be called from any thread, so that a server need not hold its engine up. Raises RequestError.
        """
        return self._constraints.compile(StructuredOutputs.of(wish))

    @cached_property
    def _constraints(self) -> Compiler:
        from trimtab.decoding.constraints.compiler import Compiler

        tokenizer = self.model.tokenizer
        if tokenizer is None or not tokenizer.available:
            raise RequestError("structured_outputs needs a tokenizer, and this model has none")
        return Compiler(tokenizer, self.model.config.vocab_size, self._eos_ids)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.model.tokenizer is None:
                raise RequestError("the prompt is text but this model has no tokenizer; give token ids")
            ids = self.model.tokenizer.encode(prompt)
        else:
            try:
                ids = [operator.index(t) for t in prompt]
            except TypeError:
                raise RequestError("a prompt must be a text or a list of token ids (whole numbers)") from None
            vocab = self.model.config.vocab_size
            for token in ids:
                if not 0 <= token < vocab:
                    raise RequestError(
                        f"the prompt has token id {token}; the model's ids are 0 to {vocab - 1}"
                    )
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        return ids

    def cancel(self, requests: Sequence[Request]) -> None:
        """End requests now; their memory is free at once."""
        for request in requests:
            if request.state is not State.FINISHED:
                self.scheduler.finish(request, "cancelled")

    # --- ways to drive it

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts together; results come in the prompts' order.

        Raises RequestError before anything runs if a prompt cannot be served, NumericsError or RequestError
        when one failed on the way.
        """
        many = _as_list(prompts)
        each = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise RequestError(
                f"there are {len(many)} prompts and {len(each)} SamplingParams; give one for each"
            )
        groups: list[list[Request]] = []
        try:
            for prompt, p in zip(many, each, strict=True):
                groups.append(self.submit(prompt, p))
            self._run([r for group in groups for r in group])
        except BaseException:
            self.cancel([r for group in groups for r in group])
            raise
        return [self.output(prompt, group) for prompt, group in zip(many, groups, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Piece, None, None]:
        """Complete one prompt, yielding text as it becomes certain; closing the iterator cancels it."""
        params = params or SamplingParams()
        if params.num_samples != 1:
            raise RequestError(f"a stream is of one text, but n or best_of is {params.num_samples}")
        requests = self.submit(prompt, params)
        request = requests[0]
        try:
            while request.state is not State.FINISHED:
                self.step()
                if request.state is State.FINISHED:
                    break
                if request.unread and not request.held_back:
                    yield request.take()
            self._raise_errors(requests)
            yield request.take()
        finally:
            self.cancel(requests)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[ScoreOutput]:
        """Log-probability of each continuation after its context (both token ids).

        The context is fed as a prompt, the continuation as decoding would feed it, so a lossy cache acts on
        what is scored. Many pairs run together.
        """
        requests: list[Request] = []
        try:
            for context, continuation in pairs:
                if not continuation:
                    raise RequestError("the continuation to score is empty; give at least one token")
                requests += self.submit(context, SamplingParams(), self._encode(continuation))
            self._run(requests)
        except BaseException:
            self.cancel(requests)
            raise
        return [ScoreOutput(r.scores, r.greedy, r.metrics) for r in requests]

    def _run(self, requests: list[Request]) -> None:
        while any(r.state is not State.FINISHED for r in requests):
            self.step()
        self._raise_errors(requests)
        if not self.scheduler.has_work:
            self.cache.check()

    @staticmethod
    def _raise_errors(requests: list[Request]) -> None:
        for request in requests:
            if request.error:
                raise request.fault(request.error)

    @staticmethod
    def output(prompt: Prompt, group: list[Request]) -> RequestOutput:
        """What `generate` returns for the requests that `submit` made of one prompt."""
        params = group[0].params
        chosen = group
        if params.num_samples > params.n:
            chosen = sorted(group, key=lambda r: -r.cumulative_logprob)[: params.n]
        outputs = [r.completion() for r in chosen]
        for i, completion in enumerate(outputs):
            completion.index = i
        first = group[0]
        return RequestOutput(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=first.tokens[: first.prompt_length],
            outputs=outputs,
            prompt_logprobs=first.prompt_logprobs if params.prompt_logprobs is not None else None,
        )

    # --- one step

    def step(self, meanwhile: Callable[[], None] | None = None) -> list[Request]:
        """Schedule, compute, commit and sample once. Returns the requests that got a token or ended.

        `meanwhile` is called just before the model runs: what it sets going in other threads has the
        interpreter to itself then.
        """
        picks = self.scheduler.schedule()
        failed, self.scheduler.failed = self.scheduler.failed, []
        if not picks:
            return failed
        self._peak = max(self._peak, self.cache.bytes_held)
        logit_rows, owners = self.outcomes.wanted(picks)
        if meanwhile is not None:
            meanwhile()
        with self._quiet_torch():
            out = self.runner.run(picks, logit_rows)
            self.cache.commit(out.rows, [pick.count for pick in picks])
        for pick in picks:
            request = pick.request
            request.computed += pick.count
            assert request.sequence is not None
            if self.scheduler.prefix_caching:
                self.cache.publish_prefix(request.sequence, request.tokens)
            metrics = request.metrics
            metrics.kv_bytes_held = self.cache.held_by(request.sequence)
            metrics.kv_bytes_peak = max(metrics.kv_bytes_peak, metrics.kv_bytes_held)
            metrics.kv_bytes_host = self.cache.host_held_by(request.sequence)
        self._steps += 1
        self._tokens += out.rows.positions.shape[0]
        return failed + self.outcomes.use(out.logits, owners)

    @contextmanager
    def _quiet_torch(self) -> Iterator[None]:
        """Keep torch's own threads asleep while the C++ kernels' threads work: after one parallel torch
        operation they spin for milliseconds on the cores that the kernels need."""
        threads = torch.get_num_threads()
        if self.backend == "torch" or threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    # --- meters

    def stats(self) -> EngineStats:
        cache, scheduler = self.cache, self.scheduler
        return EngineStats(
            steps=self._steps,
            tokens=self._tokens,
            kv_bytes_capacity=cache.bytes_capacity,
            kv_bytes_held=cache.bytes_held,
            kv_bytes_peak=self._peak,
            kv_bytes_cached=cache.bytes_cached,
            kv_bytes_moved=cache.bytes_moved,
            kv_bytes_fetched=cache.bytes_fetched,
            kv_bytes_host=cache.bytes_host,
            preemptions=scheduler.preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
        )

    def reset_stats(self) -> None:
        """Set the counters to zero; the cache keeps its content."""
        self._steps = self._tokens = self._peak = 0
        self.cache.bytes_moved = self.cache.bytes_fetched = 0
        self.scheduler.preemptions = self.scheduler.prefix_hit_tokens = 0


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a text, a list of ids, or a list of either."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, Integral) for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]
