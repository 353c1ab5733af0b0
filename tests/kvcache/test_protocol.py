"""The cache protocol driven by hand: rejected rows leave no trace, and bytes are what they must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from kernels.libraries import native_kernels
from kvcache.policies import LOSSY, both_backends, feed, make_engine, params, small_model, text
from trimtab.engine.setup import build_cache
from trimtab.kernels.reference import TorchKernels
from trimtab.kvcache.base import KVCache, Sequence, StepRows

LAYERS, H, G, D = 2, 4, 2, 16
TOKEN_BYTES = LAYERS * G * 2 * D * 4


@pytest.fixture(params=["native", "torch"])
def new_cache(request: pytest.FixtureRequest) -> Callable[[str], KVCache]:
    def make(name: str) -> KVCache:
        plan = trimtab.Plan(cache=name, kv_memory="4MiB", max_batch=3, max_step_tokens=128)
        kernels = native_kernels() if request.param == "native" else TorchKernels()
        return build_cache(small_model(), plan, kernels)

    return make


class Text:
    """One text's q, k, v before rotation, the same for a position however often it is asked for."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.q = torch.randn(300, LAYERS, H, D, generator=g) * 2
        self.k = torch.randn(300, LAYERS, G, D, generator=g)
        self.v = torch.randn(300, LAYERS, G, D, generator=g)

    def rows(self, layer: int, at: list[int], junk: int) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for x in (self.q, self.k, self.v):
            wrong = torch.full((junk, *x.shape[2:]), 7.5)
            parts.append(torch.cat([x[at, layer], wrong]).contiguous())
        return parts[0], parts[1], parts[2]


def step(
    cache: KVCache, work: list[tuple[Sequence, Text, int, int]], mask: Tensor | None = None
) -> list[list[Tensor]]:
    """Compute `count` true rows and then `junk` ones of each text, keep the true; outputs [span][layer]."""
    spans, bounds, positions = [], [], []
    n = 0
    for sequence, _, count, junk in work:
        assert cache.reserve(sequence, count + junk)
        spans.append([sequence.slot, n, n + count + junk])
        bounds.append((n, n + count + junk))
        positions += range(sequence.length, sequence.length + count + junk)
        n += count + junk
    at = torch.tensor(positions)
    cos, sin = small_model().rotary.cos_sin(at)
    rows = StepRows([w[0] for w in work], torch.tensor(spans, dtype=torch.int32), at, cos, sin, mask, bounds)
    cache.begin(rows)
    outs: list[list[Tensor]] = [[] for _ in work]
    for layer in range(LAYERS):
        parts = [t.rows(layer, list(range(s.length, s.length + count)), junk) for s, t, count, junk in work]
        q, k, v = (torch.cat([p[i] for p in parts]).contiguous() for i in range(3))
        cache.layer_input(layer, k.flatten(1), rows)
        out = cache.attend(layer, q, k, v, rows)
        for i, ((begin, _), (_, _, count, _)) in enumerate(zip(bounds, work, strict=True)):
            outs[i].append(out[begin : begin + count].clone())
    cache.commit(rows, [count for _, _, count, _ in work])
    cache.check()
    return outs


def prefill(cache: KVCache, sequence: Sequence, content: Text, junk: int) -> list[Tensor]:
    """The prompt in chunks of 40; rejected rows only inside it, where policies change nothing yet."""
    outs = []
    while sequence.length < sequence.prompt_length:
        count = cache.most_rows(sequence, min(40, sequence.prompt_length - sequence.length))
        inside = min(junk, sequence.prompt_length - sequence.length - count)
        outs += step(cache, [(sequence, content, count, inside)])[0]
    return outs


@pytest.mark.parametrize(("new_cache", "name"), both_backends(LOSSY), indirect=["new_cache"])
def test_rejected_rows_leave_no_trace(new_cache: Callable[[str], KVCache], name: str) -> None:
    """Three texts, drafts of 0 to 5 rejected rows at every step, against a cache that never saw them."""
    plain, drafted = new_cache(LOSSY[name]), new_cache(LOSSY[name])
    lengths = (100, 31, 3)
    content = [Text(i) for i in range(3)]
    mine = [plain.open(n) for n in lengths]
    other = [drafted.open(n) for n in lengths]
    pairs: list[tuple[Any, Any]] = []
    for a, b, t in zip(mine, other, content, strict=True):
        pairs.append((prefill(plain, a, t, 0), prefill(drafted, b, t, 17)))
    for i in range(40):
        drafts = [(i * 3 + j * 2) % 6 for j in range(3)]
        expected = step(plain, [(s, t, 1, 0) for s, t in zip(mine, content, strict=True)])
        got = step(drafted, [(s, t, 1, n) for s, t, n in zip(other, content, drafts, strict=True)])
        pairs += zip(expected, got, strict=True)
    for expected, got in pairs:
        for x, y in zip(expected, got, strict=True):
            if isinstance(plain.shape.kernels, TorchKernels):
                torch.testing.assert_close(y, x, atol=2e-6, rtol=1e-5)
            else:
                assert torch.equal(x, y)
    for a, b in zip(mine, other, strict=True):
        assert a.length == b.length
        assert plain.read_per_step(a) == drafted.read_per_step(b)
    for cache, sequences in ((plain, mine), (drafted, other)):
        for sequence in sequences:
            cache.close(sequence)
        cache.check()
        assert cache.bytes_held == 0


@pytest.mark.parametrize("name", LOSSY)
def test_keeping_nothing_changes_nothing(new_cache: Callable[[str], KVCache], name: str) -> None:
    cache = new_cache(LOSSY[name])
    sequence, content = cache.open(60), Text(1)
    prefill(cache, sequence, content, 0)
    held = cache.read_per_step(sequence)
    step(cache, [(sequence, content, 0, 4)])
    assert sequence.length == 60 and cache.read_per_step(sequence) == held


@pytest.mark.parametrize("name", ["full", "kivi 2 bits", "h2o", "snapkv", "retrieval heads"])
def test_drafts_may_form_a_tree(new_cache: Callable[[str], KVCache], name: str) -> None:
    """Two branches after the pending row: each row answers as if the other branch were not there."""
    cache, alone = new_cache(LOSSY[name]), new_cache(LOSSY[name])
    content = Text(2)
    sequence, chain = cache.open(50), alone.open(50)
    prefill(cache, sequence, content, 0)
    prefill(alone, chain, content, 0)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.uint8).flatten()
    # Rows 0 and 1 are the chain that is kept; rows 2 and 3 are junk that row 1 must not see.
    tree = step(cache, [(sequence, content, 2, 2)], mask)[0]
    plain = step(alone, [(chain, content, 2, 0)])[0]
    for x, y in zip(tree, plain, strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)
    after = step(cache, [(sequence, content, 1, 0)])[0]
    for x, y in zip(after, step(alone, [(chain, content, 1, 0)])[0], strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSY)
def test_a_reservation_that_fails_changes_nothing(new_cache: Callable[[str], KVCache], name: str) -> None:
    cache = new_cache(LOSSY[name])
    sequence, content = cache.open(60), Text(1)
    prefill(cache, sequence, content, 0)
    held = cache.held_by(sequence)
    fillers: list[Any] = []
    for store in (getattr(cache, "pool", None), *getattr(cache, "pools", {}).values()):
        while store is not None and (page := store.alloc()) is not None:
            fillers.append(page)
    if not fillers:  # rows a head
        rows = cache.rows  # type: ignore[attr-defined]
        for pool in rows.arena.pools:
            while pool.alloc() is not None:
                pass
    assert not cache.reserve(sequence, 128)
    assert cache.held_by(sequence) == held and sequence.length == 60


def pages(rows: int) -> int:
    return -(-rows // 16)


def full_bytes(length: int) -> int:
    return pages(length) * 16 * TOKEN_BYTES


def streaming_bytes(length: int, sinks: int, window: int) -> int:
    """The pages of the sinks, and those that the next query's window touches."""
    first = max(pages(sinks), (length + 1 - window) // 16)
    return (pages(sinks) + pages(length) - first) * 16 * TOKEN_BYTES


def coded_bytes(length: int, bits: int, group: int, keys: int, unit: int, values: int) -> float:
    """Codes, two float16 constants a group, and what is in full; pages and units are whole."""
    return half_coded_bytes(length, bits, group, keys, unit) + half_coded_bytes(length, bits, group, values)


def half_coded_bytes(length: int, bits: int, group: int, coded: int, unit: int = 16) -> float:
    """Of keys or values alone."""
    row = D * bits / 8 + D / group * 4  # on average over a unit of keys, where constants are a channel's
    full = (pages(length) - coded // 16) * 16 * D * 4
    return LAYERS * G * (-(-coded // unit) * unit * row + full)


def kivi_bytes(length: int, bits: int, group: int, residual: int) -> float:
    keys, values = length // residual * residual, max(0, length - residual)
    return coded_bytes(length, bits, group, keys, math.lcm(group, 16), values)


def rtn_bytes(length: int, bits: int, group: int, residual: int = 0) -> float:
    return coded_bytes(length, bits, group, length - residual, 16, length - residual)


def keys_bytes(rows: int, near_layers: int = 0) -> int:
    """Keys of all layers, values of the first ones."""
    return (LAYERS + near_layers) * G * pages(rows) * 16 * D * 4


def per_head_bytes(rows: int, notes: int = 0) -> int:
    return LAYERS * G * pages(rows) * 16 * (2 * D * 4 + notes)


def row_bytes(rows: int) -> int:
    """Where heads differ in length: what their rows take, without the unfilled part of each last page."""
    return LAYERS * G * rows * 2 * D * 4


def moment_bytes() -> int:
    """A count, and of every query head the sum of queries and of their outer products."""
    return 8 + LAYERS * H * (D + D * D) * 4


def retrieval_bytes(length: int, whole: int, sinks: int, window: int) -> float:
    """`whole` of the KV heads hold all, the others what streaming holds."""
    share = whole / (LAYERS * G)
    return share * full_bytes(length) + (1 - share) * streaming_bytes(length, sinks, window)


def rotatekv_bytes(length: int, bits: int, group: int, kept: int) -> float:
    """Codes and two float16 constants a group of K and of V, tokens kept, and the page begun in full."""
    coded = pages(length) * 16 * LAYERS * 2 * G * D * (bits / 8 + 4 / group)
    return coded + kept * LAYERS * 2 * G * D * 4 + (pages(length) - length // 16) * 16 * TOKEN_BYTES


def kvquant_bytes(length: int, bits: int, listed: int, sides: int, kept: int) -> float:
    """Codes; a byte twice for each token's lists of keys; a range in float16 for each token's values; numbers
    listed, of 6 bytes, `sides` of a token's values and `listed` keys of 16 tokens; in 64ths of full rows."""
    unit = 16 * (2 * G * D * bits / 8 + 2 + 4 + sides * 6) + listed * 6
    part = 16 * 2 * G * D * 4 / 64
    coded = pages(length) * LAYERS * math.ceil(unit / part) * part
    return coded + kept * LAYERS * 2 * G * D * 4 + (pages(length) - length // 16) * 16 * TOKEN_BYTES


def sentence_bytes(length: int, budget: int, near: int, max_sentence: int) -> int:
    """The prompt's `near` rows, then the budget; a vector a sentence, the sums of the one under way."""
    sentences = math.ceil(100 / max_sentence) + (length - 100) // max_sentence
    return per_head_bytes(near if length == 100 else budget) + LAYERS * G * D * 4 * (sentences + 2)


ANALYTIC: dict[str, Callable[[int], float]] = {
    "full": full_bytes,
    "streaming": lambda n: streaming_bytes(n, 4, 28),
    "streaming, wide": lambda n: streaming_bytes(n, 20, 100),
    "streaming, window only": lambda n: streaming_bytes(n, 0, 33),
    "streaming, logical positions": lambda n: streaming_bytes(n, 20, 16),
    "kivi 2 bits": lambda n: kivi_bytes(n, 2, 16, 32),
    "kivi 4 bits": lambda n: kivi_bytes(n, 4, 16, 16),
    "kivi 3 bits, small groups": lambda n: kivi_bytes(n, 3, 8, 24),
    "kivi 8 bits, as it comes": lambda n: kivi_bytes(n, 8, 4, 20),
    "rtn 2 bits": lambda n: rtn_bytes(n, 2, 16),
    "rtn 4 bits, small groups": lambda n: rtn_bytes(n, 4, 8, 10),
    "rtn 3 bits, as it comes": lambda n: rtn_bytes(n, 3, 16),
    "snapkv + kivi": lambda n: kivi_bytes(48 + n - 100, 2, 16, 16),
    "h2o + rtn": lambda n: rtn_bytes(40, 4, 16) + LAYERS * G * pages(40 + 1) * 16 * 8,
    "h2o": lambda n: per_head_bytes(40 + 1, notes=8),  # the page for the next row stays
    "h2o, mostly heavy": lambda n: per_head_bytes(33 + 1, notes=8),
    "snapkv": lambda n: per_head_bytes(48 + n - 100),
    "snapkv, max": lambda n: per_head_bytes(40 + n - 100),
    "sentencekv": lambda n: sentence_bytes(n, 20, 12, 12),
    "sentencekv, one sentence at a time": lambda n: sentence_bytes(n, 33, 1, 40),
    "kcache": keys_bytes,
    "kcache, renormalized": lambda n: keys_bytes(n, near_layers=1),
    "snapkv + kcache": lambda n: keys_bytes(48 + n - 100),
    "h2o + kcache": lambda n: keys_bytes(40 + 1) + LAYERS * G * 48 * 8,
    "kivi + kcache": lambda n: half_coded_bytes(n, 4, 16, n // 16 * 16),
    "rtn + kcache": lambda n: half_coded_bytes(n, 3, 8, n - 10),
    "snapkv + kivi + kcache": lambda n: half_coded_bytes(n - 20, 2, 16, (n - 20) // 32 * 32),
    "h2o + rtn + kcache": lambda n: half_coded_bytes(40, 4, 16, 40) + LAYERS * G * pages(40 + 1) * 16 * 8,
    "h2o in chunks": lambda n: per_head_bytes(45 + 1, notes=8),
    "snapkv in chunks": lambda n: per_head_bytes(40 + (n - 100) % 10) + LAYERS * 8 * H * D * 4,
    "expected attention": lambda n: per_head_bytes(40 + n - 100),
    "expected attention in chunks": lambda n: per_head_bytes(36 + (n - 100) % 9) + moment_bytes(),
    "adakv": lambda n: row_bytes(40 + n - 100),
    "adakv in chunks": lambda n: row_bytes(30 + (n - 100) % 9) + moment_bytes(),
    "retrieval heads": lambda n: retrieval_bytes(n, 1, 4, 28),
    "retrieval heads, none kept": lambda n: retrieval_bytes(n, 0, 20, 5),
    "kvquant 2 bits": lambda n: kvquant_bytes(n, 2, math.ceil(5.12 * 6), 2, kept=0),
    "kvquant 3 bits": lambda n: kvquant_bytes(n, 3, math.ceil(5.12 * 10), 2, kept=5),
    "kvquant 4 bits, dense": lambda n: kvquant_bytes(n, 4, 0, 0, kept=0),
    "kvquant, late and even": lambda n: kvquant_bytes(n, 3, math.ceil(5.12 * 1.25), 2, kept=0),
    "rotatekv 2 bits": lambda n: rotatekv_bytes(n, 2, 16, kept=3),
    "rotatekv 3 bits, folded": lambda n: rotatekv_bytes(n, 3, 32, kept=0),
}


@pytest.mark.parametrize(("new_cache", "name"), both_backends(LOSSY), indirect=["new_cache"])
def test_bytes_held_are_the_analytic_figure(new_cache: Callable[[str], KVCache], name: str) -> None:
    """After a prompt of 100 tokens and after each of 70 generated ones; a second text holds its own."""
    cache = new_cache(LOSSY[name])
    unfilled = per_head_bytes(1) if name.startswith("adakv") else 0
    sequence, content = cache.open(100), Text(3)
    prefill(cache, sequence, content, 0)
    for length in range(100, 170):
        assert sequence.length == length
        assert 0 <= cache.held_by(sequence) - ANALYTIC[name](length) <= unfilled, length
        assert cache.bytes_held == cache.held_by(sequence)
        step(cache, [(sequence, content, 1, 0)])
    second = cache.open(100)
    prefill(cache, second, content, 0)
    assert cache.bytes_held == cache.held_by(sequence) + cache.held_by(second)
    cache.close(sequence)
    assert cache.bytes_held == cache.held_by(second)
    assert 0 <= cache.bytes_held - ANALYTIC[name](100) <= unfilled
    cache.close(second)
    assert cache.bytes_held == 0


def test_snapkv_counts_the_queries_it_keeps_until_the_prompt_ends(
    new_cache: Callable[[str], KVCache],
) -> None:
    cache = new_cache("snapkv:budget=48,window=16")
    sequence, content = cache.open(100), Text(4)
    step(cache, [(sequence, content, 32, 0)])
    assert cache.held_by(sequence) == per_head_bytes(32) + LAYERS * 16 * H * D * 4
    short = cache.open(48)
    assert cache.held_by(short) == 0, "a prompt within the budget keeps none"


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_h2o_scores_have_the_same_bits_in_chunks(chunk: int) -> None:
    """And are what every row received from all queries so far."""
    plan = trimtab.Plan(cache="h2o:budget=400", kv_memory="4MiB", max_batch=2, max_step_tokens=128)
    seen = []
    for size in (100, chunk):
        cache = build_cache(small_model(), plan, native_kernels())
        sequence, content = cache.open(100), Text(5)
        while sequence.length < 100:
            step(cache, [(sequence, content, min(size, 100 - sequence.length), 0)])
        seen.append(sequence.notes[0][..., :100])  # type: ignore[attr-defined]
    assert torch.equal(*seen)
    cos, sin = small_model().rotary.cos_sin(torch.arange(100))
    q, k = content.q[:100, 1].clone(), content.k[:100, 1].clone()
    for x in (q, k):
        TorchKernels().rotate(x, cos, sin)
    scores = torch.einsum("nhd,thd->hnt", q, k.repeat_interleave(2, 1)) * D**-0.5
    p = scores.masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf).softmax(-1)
    received = p.sum(1).unflatten(0, (G, 2)).sum(1)
    torch.testing.assert_close(seen[0][1], received, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_is_held_beyond_the_bound_however_small(name: str) -> None:
    """Bounds in which only one text fits at a time; each ends as it should or says that it cannot."""
    for blocks in (7, 11, 17):
        engine = make_engine(LOSSY[name], kv_memory=blocks * 16 * TOKEN_BYTES, max_step_tokens=32)
        requests = [engine.submit(text(50, i), params(max_tokens=30))[0] for i in range(4)]
        while engine.scheduler.has_work:
            engine.step()
            assert engine.cache.bytes_held + engine.cache.bytes_cached <= engine.cache.bytes_capacity
            assert engine.cache.bytes_capacity <= engine.plan.kv_memory
            engine.cache.check()
        assert engine.stats().kv_bytes_peak <= engine.plan.kv_memory
        assert {r.finish_reason for r in requests} <= {"length", "error"}
        assert blocks == 7 or all(r.finish_reason == "length" for r in requests)
        assert engine.cache.bytes_held == 0


def test_kivi_at_two_bits_holds_a_quarter_of_the_full_cache() -> None:
    model = trimtab.load(dtype="bfloat16")
    held = {}
    for cache in ("full", "kivi:bits=2"):
        engine = make_engine(cache, model=model, kv_memory="64MiB")
        held[cache] = engine.cache.held_by(feed(engine, text(2040)).sequence)  # type: ignore[arg-type]
    assert held["full"] == 128 * 16 * model.kv_bytes_per_token()
    assert held["kivi:bits=2"] <= 0.25 * held["full"]


def test_endless_streaming_holds_the_same_bytes_for_ever() -> None:
    engine = make_engine("streaming:sinks=4,window=60")
    [request] = engine.submit(text(700), params(max_tokens=5000, logprobs=None, temperature=0))
    seen = set()
    table = engine.cache._rows.table.shape  # type: ignore[attr-defined]
    while engine.scheduler.has_work:
        engine.step()
        if request.computed > 764:
            seen.add(engine.cache.bytes_held)
    assert request.finish_reason == "length" and len(request.output_ids) == 5000
    block = 16 * TOKEN_BYTES
    assert max(seen) - min(seen) <= block and max(seen) <= (1 + math.ceil(60 / 16) + 1) * block
    assert engine.cache._rows.table.shape == table  # type: ignore[attr-defined]
    engine.cache.check()
