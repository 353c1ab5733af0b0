"""Requests that share a beginning attend to it together, and nobody can tell by the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.libraries import native_kernels
from kvcache.policies import CONTEXT, feed, make_engine, results, small_model, text
from trimtab.kvcache.full import Full

BEGIN = text(530, 21)
BRANCHES = [BEGIN + text(3 + i, 30 + i) for i in range(5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_together_is_alone_bit_for_bit(dtype: torch.dtype) -> None:
    model = small_model.__wrapped__(dtype)
    settings: dict[str, Any] = dict(model=model, kv_memory="64MiB")
    alone = [
        results(make_engine("full:hydragen=false", prefix_caching=False, **settings), [p], max_tokens=20)[0]
        for p in BRANCHES
    ]
    ways: list[dict[str, Any]] = [{}, {"max_step_tokens": 40}, {"threads": 3}]
    for changes in ways:
        engine = make_engine("full", **settings | changes)
        results(engine, [BEGIN], max_tokens=1)
        assert results(engine, BRANCHES, max_tokens=20) == alone
        assert engine.stats().prefix_hit_tokens == len(BRANCHES) * 528


def test_siblings_read_their_prompt_once() -> None:
    engine = make_engine("full", kv_memory="64MiB")
    cache = engine.cache
    assert isinstance(cache, Full) and CONTEXT > 560
    results(engine, [BEGIN], max_tokens=1)
    running = [feed(engine, p) for p in BRANCHES]
    slots = [r.sequence.slot for r in running if r.sequence is not None]
    spans = torch.tensor([[slot, i, i + 1] for i, slot in enumerate(slots)], dtype=torch.int32)
    rows = replace(cache._rows, spans=spans)
    begun, keys = native_kernels(torch.float32).shared(rows)
    held = [r.sequence.length for r in running if r.sequence is not None]
    assert begun.tolist() == [512] * len(BRANCHES)
    assert keys == 512 + sum(length - 512 for length in held)
    engine.cancel(running)


def test_it_can_be_switched_off() -> None:
    cache = make_engine("full:hydragen=false").cache
    assert isinstance(cache, Full) and not cache._rows.share
