"""An engine whose model is a pure function of the tokens so far, so that whole workloads run in milliseconds.

Cache, scheduler and engine are the real ones; only the model call is replaced. What a request must
produce is known in advance (`continuation`), whatever else is in the batch.
"""

from __future__ import annotations

import functools
import zlib
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import trimtab
from trimtab.engine.runner import StepOutput
from trimtab.engine.scheduler import Pick
from trimtab.kvcache.base import StepRows
from trimtab.models.config import ModelConfig
from trimtab.models.hub import find_folder
from trimtab.models.shapes import random_model, shape
from trimtab.models.tokenizer import Tokenizer
from trimtab.models.transformer import Model

SHIPPED = find_folder(None)
VOCAB = 50
CONTEXT = 256
BLOCK_BYTES = 16 * 2 * 16 * 4  # 16 tokens, K and V, one layer, one head of 16 floats


@functools.cache
def tiny_config() -> ModelConfig:
    return shape(
        "125m",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        eos_token_id=2,
    )


@functools.cache
def tiny_model() -> Model:
    return random_model(tiny_config())


def next_token(tokens: list[int]) -> int:
    """What the fake model says after `tokens`: anything from 3 on, by a checksum of all of them."""
    return 3 + zlib.crc32(array("q", tokens).tobytes()) % (VOCAB - 3)


def continuation(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    """Checks each step's picks, notes them, and answers with `next_token`."""

    def __init__(self, engine: trimtab.Engine, say: Callable[[list[int]], int] = next_token) -> None:
        self.engine = engine
        self.say = say
        self.steps: list[list[Pick]] = []
        self.fail_on: list[int] | None = None  # tokens after which the logits are NaN

    def run(self, picks: list[Pick], logit_rows: list[int]) -> StepOutput:
        engine = self.engine
        requests = [p.request for p in picks]
        assert len({id(r) for r in requests}) == len(requests), "a request was picked twice in one step"
        assert len(requests) <= engine.plan.max_batch
        assert 0 < sum(p.count for p in picks) <= engine.plan.max_step_tokens
        assert engine.cache.bytes_held + engine.cache.bytes_cached <= engine.cache.bytes_capacity
        texts: list[list[int]] = []
        bounds = []
        for p in picks:
            request, sequence = p.request, p.request.sequence
            assert p.count >= 1 and request in engine.scheduler.running
            assert sequence is not None and sequence.length == request.computed
            assert request.computed + p.count <= len(request.tokens)
            assert len(sequence.blocks) * 16 >= request.computed + p.count, "no room was reserved"  # type: ignore[attr-defined]
            bounds.append((len(texts), len(texts) + p.count))
            texts += [request.tokens[: request.computed + i + 1] for i in range(p.count)]
        self.steps.append(picks)
        logits = torch.zeros(len(logit_rows), self.engine.model.config.vocab_size)
        for i, row in enumerate(logit_rows):
            logits[i, self.say(texts[row])] = 9.0
            if texts[row] == self.fail_on:
                logits[i] = float("nan")
        n = len(texts)
        rows = StepRows(
            sequences=[r.sequence for r in requests],  # type: ignore[misc]
            spans=torch.tensor([[r.sequence.slot, a, b] for r, (a, b) in zip(requests, bounds, strict=True)]),  # type: ignore[union-attr]
            positions=torch.zeros(n, dtype=torch.int64),
            cos=torch.zeros(n, 8),
            sin=torch.zeros(n, 8),
            bounds=bounds,
        )
        return StepOutput(rows, logits)


def fake_engine(blocks: int = 64, **options: Any) -> tuple[trimtab.Engine, FakeRunner]:
    """An engine with room for `blocks` blocks of 16 tokens."""
    settings = (
        dict(kv_memory=blocks * BLOCK_BYTES, max_batch=4, max_step_tokens=32, backend="torch") | options
    )
    engine = trimtab.Engine(tiny_model(), **settings)
    runner = FakeRunner(engine)
    engine.runner = runner  # type: ignore[assignment]
    return engine, runner


@functools.cache
def talking_model() -> Model:
    """A tiny model with the shipped tokenizer; what it says is up to the runner."""
    model = random_model(replace(tiny_config(), vocab_size=4096, eos_token_ids=(2,)))
    model.tokenizer = Tokenizer.from_folder(SHIPPED)
    return model


def scripted_engine(text: str, end: int | None = None, **options: Any) -> tuple[trimtab.Engine, list[int]]:
    """An engine that answers every prompt of two tokens with `text` (then `end`, else for ever a full stop).

    Returns it and the tokens of the text.
    """
    engine = trimtab.Engine(talking_model(), **(dict(kv_memory="1MiB", backend="torch") | options))
    tokenizer = engine.model.tokenizer
    assert tokenizer is not None
    script = tokenizer.encode(text, add_special_tokens=False)
    [dot] = tokenizer.encode(".", add_special_tokens=False)
    after = [*script, *([] if end is None else [end])]

    def say(tokens: list[int]) -> int:
        at = len(tokens) - 2
        return after[at] if at < len(after) else dot

    engine.runner = FakeRunner(engine, say)  # type: ignore[assignment]
    return engine, script


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens that no other seed begins with."""
    return [
        3 + (seed * 7919 + i * i * 31 + i) % (VOCAB - 3) if i else 3 + seed % (VOCAB - 3)
        for i in range(length)
    ]


def greedy(max_tokens: int = 8, **changes: Any) -> trimtab.SamplingParams:
    return trimtab.SamplingParams(**(dict(max_tokens=max_tokens, temperature=0.0, ignore_eos=True) | changes))
