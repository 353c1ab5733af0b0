"""Perplexity under a working cache: how well the next tokens are foreseen from a compressed past.

Windows of `context + stride` tokens are spread evenly over a text. The context is fed as a prompt; the
next `stride` tokens are scored one after another exactly as decoding would compute them, so that a lossy
cache acts on every scored token. Each window starts afresh (with the tokenizer's first token where it
has one). Scoring a whole text in one forward pass, as is usual, would never touch a cache.

Not covered: comparing models with different tokenizers by perplexity (use bits per byte for that).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError
from trimtab.evaluation.chat import tokenizer_of
from trimtab.evaluation.corpus import load_text
from trimtab.evaluation.memory import held_metrics, host_metrics
from trimtab.evaluation.statistics import standard_error
from trimtab.evaluation.tasks.base import Metric, Task, TaskContext, TaskResult
from trimtab.registry import TASKS, Card

if TYPE_CHECKING:
    from trimtab.engine.engine import Engine
    from trimtab.models.tokenizer import Tokenizer

MAX_CHARACTER_TOKENS = 8  # more tokens than any one character is cut into


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """Settings of `perplexity`.

    text: `shipped`, `wikitext2` (below `folder`) or the path of a text file.
    folder: where `wikitext2` is looked for.
    context: tokens fed as the prompt of each window.
    stride: tokens scored after it.
    windows: how many windows; none = as many as fit without scoring a token twice.
    """

    text: str = "shipped"
    folder: str = "data"
    context: int = 512
    stride: int = 128
    windows: int | None = 32

    def __post_init__(self) -> None:
        for name in ("context", "stride", "windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"option {name!r} of task 'perplexity' is {value}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids of a context and of the tokens to score after it, whose text has `scored_bytes` bytes."""

    context: list[int]
    scored: list[int]
    scored_bytes: int


@TASKS.add(
    options=PerplexityOptions,
    card=Card(
        title="Perplexity",
        idea="Windows spread over a text: a context is fed as a prompt, then the next tokens are scored one "
        "by one exactly as decoding computes them. Perplexity is exp of the mean negative log-likelihood.",
        exactness="Scored tokens see the plan's own cache, compression and eviction included. The standard "
        "error is taken over windows, because tokens of one window are not independent; differences between "
        "plans are taken window by window.",
        cost="windows x (context + stride) tokens; about 20,000 with the defaults.",
        needs="A text of at least context + stride tokens and a model whose context is at least as long.",
        avoid_when="You want to know whether single facts survive in the cache: a few lost tokens hardly "
        "move perplexity. Use needle.",
    ),
)
class Perplexity(Task):
    options: PerplexityOptions

    def run(self, engine: Engine, ctx: TaskContext) -> TaskResult:
        o, model = self.options, engine.model
        length = o.context + o.stride
        if length > model.config.context_length:
            raise ConfigError(
                f"task 'perplexity' wants context={o.context} + stride={o.stride} = {length} tokens, but the "
                f"model's context is {model.config.context_length}; make context smaller"
            )
        windows = cut_windows(tokenizer_of(engine, "perplexity"), load_text(o.text, o.folder), o)
        losses, tokens, held, host = [], [], [], []
        fetched = engine.stats().kv_bytes_fetched
        batch = engine.plan.max_batch
        for start in range(0, len(windows), batch):
            part = windows[start : start + batch]
            for window, scored in zip(part, engine.score([(w.context, w.scored) for w in part]), strict=True):
                losses.append(-math.fsum(scored.logprobs) / len(window.scored))
                tokens.append(len(window.context) + len(window.scored))
                held.append(scored.metrics.kv_bytes_held)
                host.append(scored.metrics.kv_bytes_host)
            ctx.progress(min(1.0, (start + batch) / len(windows)))
        scored_tokens = sum(len(w.scored) for w in windows)
        scored_bytes = sum(w.scored_bytes for w in windows)
        total = math.fsum(loss * len(w.scored) for loss, w in zip(losses, windows, strict=True))
        return TaskResult(
            metrics={
                **loss_metrics(total, scored_tokens, scored_bytes, standard_error(losses)),
                "tokens": Metric(scored_tokens, "tokens", n=len(windows)),
                **held_metrics(model.config, tokens, held),
                **host_metrics(host, engine.stats().kv_bytes_fetched - fetched, scored_tokens),
            },
            detail={"window_losses": losses},
        )

    def relate(self, result: TaskResult, reference: TaskResult) -> dict[str, Metric]:
        pairs = zip(result.detail["window_losses"], reference.detail["window_losses"], strict=True)
        differences = [ours - theirs for ours, theirs in pairs]
        ours, theirs = result.metrics["perplexity"].value, reference.metrics["perplexity"].value
        assert ours is not None and theirs is not None
        error = standard_error(differences)
        return {
            "perplexity_change": Metric(
                ours - theirs,
                "",
                "lower",
                None if error is None else ours * error,
                len(differences),
                label="Δ perplexity",
                change_of="perplexity",
            )
        }


def loss_metrics(total: float, tokens: int, size: int, loss_error: float | None) -> dict[str, Metric]:
    """Perplexity and bits per byte from a summed loss in nats over `tokens` tokens of `size` bytes.

    `loss_error` is the standard error of the mean loss per token; both errors follow to first order.
    """
    loss = total / tokens
    perplexity = math.exp(min(loss, 700.0))  # a broken cache must give a huge number, not an overflow
    nats_to_bits_per_byte = tokens / size / math.log(2)
    return {
        "perplexity": Metric(
            perplexity,
            "",
            "lower",
            None if loss_error is None else perplexity * loss_error,
            tokens,
            label="perplexity",
            axis="quality",
        ),
        "bits_per_byte": Metric(
            loss * nats_to_bits_per_byte,
            "bit/B",
            "lower",
            None if loss_error is None else loss_error * nats_to_bits_per_byte,
            tokens,
        ),
        "loss": Metric(loss, "nat", "lower", loss_error, tokens),
    }


def cut_windows(tokenizer: Tokenizer, text: str, options: PerplexityOptions) -> list[Window]:
    """The windows, spread evenly over `text`; scored parts never overlap and hold whole characters."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    context = options.context - len(first)
    # Room for scored parts that are moved on to the next whole character.
    slots = (len(ids) - context - MAX_CHARACTER_TOKENS) // options.stride
    if slots < 1:
        raise ConfigError(
            f"text {options.text!r} has only {len(ids)} tokens; task 'perplexity' needs "
            f"context={options.context} + stride={options.stride} tokens and a few more"
        )
    count = slots if options.windows is None else min(options.windows, slots)
    starts = [context + options.stride * (i * slots // count) for i in range(count)]
    return [_window(tokenizer, ids, s, context, options.stride, first) for s in starts]


def _window(
    tokenizer: Tokenizer, ids: list[int], start: int, context: int, stride: int, first: list[int]
) -> Window:
    begin = start - context
    end = _whole_character(tokenizer, ids, begin, start + stride)
    start = _whole_character(tokenizer, ids, begin, start)
    size = _bytes(tokenizer, ids[begin:end]) - _bytes(tokenizer, ids[begin:start])
    return Window(first + ids[begin:start], ids[start:end], size)


def _bytes(tokenizer: Tokenizer, ids: list[int]) -> int:
    return len(tokenizer.decode(ids, skip_special_tokens=False).encode("utf-8"))


def _whole_character(tokenizer: Tokenizer, ids: list[int], begin: int, end: int) -> int:
    """The first position from `end` on at which no character is cut in two."""
    for candidate in range(end, min(end + MAX_CHARACTER_TOKENS, len(ids))):
        if not tokenizer.decode(ids[begin:candidate]).endswith("\ufffd"):
            return candidate
    return end
