"""What stays on the device, what lies in host memory, and what crosses between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from kernels.libraries import native_kernels
from kvcache.dense import score
from kvcache.dense_offload import DenseSentenceKV
from kvcache.policies import (
    LOSSY,
    PROMPTS,
    feed,
    make_engine,
    params,
    results,
    small_model,
    text,
)
from kvcache.shapes import make_shape
from kvcache.test_protocol import LAYERS, D, G, H, Text, prefill, step
from kvcache.test_signatures import found, haystacks
from trimtab.engine.setup import build_cache
from trimtab.errors import ConfigError, PlanError, RequestError
from trimtab.kernels.reference import TorchKernels
from trimtab.kernels.reference_coded import places
from trimtab.kvcache.base import KVCache
from trimtab.kvcache.paging.far_coded import FarCodedRows
from trimtab.kvcache.paging.per_head import PerHeadRows
from trimtab.models.sentences import sentence_ends

HALF_ROW = D * 4  # bytes of the keys or the values of one token, layer and head
# Packed stores: bytes of a coded row of values, and how many of the latest values are in full.
STORES = {
    "kivi:bits=4,group_size=16,residual=32": (8 + 4, 32),
    "kivi:bits=2,group_size=8,residual=24": (4 + 8, 24),
    "rtn:bits=3,group_size=16,residual=5": (6 + 4, 5),
    "rtn:bits=8,group_size=4": (16 + 16, 0),
}


def new_cache(name: str) -> KVCache:
    plan = trimtab.Plan(cache=name, kv_memory="4MiB", max_batch=3, max_step_tokens=128)
    return build_cache(small_model(), plan, native_kernels())


# --- KCache


def rotated(x: Tensor) -> Tensor:
    x = x.clone()
    TorchKernels().rotate(x, *small_model().rotary.cos_sin(torch.arange(len(x))))
    return x


def truth(content: Text, layer: int, length: int) -> tuple[Tensor, Tensor]:
    """Probabilities [G, group, T] and outputs [G, group, d] of the last of `length` tokens."""
    q = rotated(content.q[:length, layer])[-1].unflatten(0, (G, H // G))
    k = rotated(content.k[:length, layer])
    p = (torch.einsum("gxd,tgd->gxt", q, k) * D**-0.5).softmax(-1)
    return p, torch.einsum("gxt,tgd->gxd", p, content.v[:length, layer])


def test_kcache_halves_the_devices_bytes_exactly() -> None:
    held = {}
    for cache in ("full", "kcache:n=8"):
        engine = make_engine(cache, prefix_caching=False)
        request = feed(engine, text(200), text(30, 1))
        assert request.sequence is not None
        held[cache] = engine.cache.held_by(request.sequence)
        assert request.metrics.kv_bytes_host == (0 if cache == "full" else held["full"] / 2)
        assert engine.stats().kv_bytes_host == request.metrics.kv_bytes_host
        engine.cancel([request])
        assert engine.stats().kv_bytes_held == engine.stats().kv_bytes_host == 0
    assert held["kcache:n=8"] * 2 == held["full"]


def test_kcache_errs_by_less_than_what_it_drops() -> None:
    """Below the dropped probability times the largest value, and ever less as n grows."""
    mean = []
    for n in (1, 4, 16, 64, 101):
        cache, content = new_cache(f"kcache:n={n}"), Text(3)
        sequence = cache.open(100)
        prefill(cache, sequence, content, 0)
        outs = step(cache, [(sequence, content, 1, 0)])[0]
        errors = []
        for layer in range(LAYERS):
            p, exact = truth(content, layer, 101)
            error = (outs[layer][0].unflatten(0, (G, H // G)) - exact).norm(dim=-1)
            dropped = 1 - p.topk(n, -1).values.sum(-1)
            largest = content.v[:101, layer].norm(dim=-1).amax(0)[:, None]
            assert (error <= dropped * largest + 1e-5).all()
            errors.append(error)
        mean.append(float(torch.stack(errors).mean()))
    assert mean == sorted(mean, reverse=True) and mean[-1] < 1e-5 < mean[-2]


@pytest.mark.parametrize("n", [1, 8, 64])
def test_kcache_moves_the_union_of_a_groups_choices(n: int) -> None:
    cache, content = new_cache(f"kcache:n={n}"), Text(3)
    sequence = cache.open(100)
    prefill(cache, sequence, content, 0)
    assert cache.bytes_fetched == 0, "the prompt is answered on the device"
    for length in range(101, 111):
        before = cache.bytes_fetched
        step(cache, [(sequence, content, 1, 0)])
        union = 0
        for layer in range(LAYERS):
            p, _ = truth(content, layer, length)
            chosen = torch.zeros_like(p).scatter(-1, p.topk(n, -1).indices, 1)
            union += int(chosen.amax(1).sum())
        assert cache.bytes_fetched - before == union * HALF_ROW
        assert LAYERS * G * n <= union <= LAYERS * H * n


def test_kcache_with_every_value_is_the_full_cache_beyond_one_block_of_scores() -> None:
    prompt = [text(560, 7)]
    assert results(make_engine("kcache:n=10000"), prompt) == results(make_engine("full"), prompt)


@pytest.mark.parametrize("store", STORES)
def test_packed_values_all_fetched_are_those_packed_in_place(store: str) -> None:
    """Bit for bit, also beyond one block of scores."""
    for prompt in ([text(300, 7)], [text(550, 8)], [text(20, 9), text(37, 3)]):
        placed = results(make_engine(f"{store}+kcache:n=10000"), prompt)
        assert placed == results(make_engine(store), prompt)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kernels", [native_kernels, TorchKernels])
def test_packed_values_cross_packed(store: str, kernels: Callable[[], Any]) -> None:
    """With all values chosen: every row's codes and constants, the latest in full; held in as many bytes."""
    plan = trimtab.Plan(cache=f"{store}+kcache:n=500", kv_memory="4MiB", max_batch=3, max_step_tokens=128)
    cache, content = build_cache(small_model(), plan, kernels()), Text(3)
    row, residual = STORES[store]
    sequence = cache.open(100)
    prefill(cache, sequence, content, 0)
    assert cache.bytes_fetched == 0, "the prompt is answered on the device"
    for length in range(100, 140):
        coded, pages = length - residual, -(-length // 16)
        held = -(-coded // 16) * 16 * row + (pages - coded // 16) * 16 * HALF_ROW
        assert cache.host_held_by(sequence) == cache.bytes_host == LAYERS * G * held
        before = cache.bytes_fetched
        step(cache, [(sequence, content, 1, 0)])
        crossed = coded * row + (residual + 1) * HALF_ROW
        assert cache.bytes_fetched - before == LAYERS * G * crossed
    cache.close(sequence)
    assert cache.bytes_held == cache.bytes_host == 0
    cache.check()


@pytest.mark.parametrize("store", STORES)
def test_codes_sent_to_another_device_mean_the_same(store: str) -> None:
    cache = new_cache(f"{store}+kcache")
    prefill(cache, cache.open(100), Text(3), 0)
    [rows] = [r for r in [cache.rows] if isinstance(r, FarCodedRows)]  # type: ignore[attr-defined]
    there = places(rows.tables(0), 0, 1, torch.arange(60), keys=False)
    assert torch.equal(there.load(torch.device("cpu", 0)), there.load()), "cpu:0 is not cpu"
    assert there.load().unique().numel() > 60


def test_fewer_bytes_cross_where_values_are_packed() -> None:
    """Of as many values, near enough, as each chooses by keys of its own."""
    fetched = {}
    for cache in ("kcache:n=16", "rtn:bits=2,group_size=16+kcache:n=16"):
        engine = make_engine(cache)
        engine.generate([text(300)], params())
        fetched[cache] = engine.stats().kv_bytes_fetched
    plain, packed = fetched.values()
    assert 8 / 64 <= packed / plain <= 1.3 * (8 + (HALF_ROW - 8) / 16) / 64


@pytest.mark.parametrize("group", [1, 3, 20])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_both_kernels_choose_alike(group: int, tree: bool, renormalize: bool) -> None:
    g = torch.Generator().manual_seed(group)
    shape = make_shape(layers=1, num_heads=2 * group)
    rows = PerHeadRows(shape, 1 << 20)
    found = []
    q, k, v = (torch.randn(47, h, 16, generator=g) for h in (2 * group, 2, 2))
    for kernels in (native_kernels(), TorchKernels()):
        rows.open(0)
        assert rows.reserve(0, 47)
        spans = torch.tensor([[0, 0, 43]], dtype=torch.int32)
        kernels.write(rows.call(0, spans), k[:43], v[:43])
        rows.length[0] = 43
        spans[0, 2] = 4
        mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.uint8)
        call = rows.call(0, spans, mask=mask.flatten() if tree else None)
        kernels.write(call, k[43:], v[43:])
        found.append(kernels.attend_top(call, q[43:].contiguous(), 5, renormalize))
        rows.close(0)
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    fetched = found[0][2]
    assert fetched.min() >= 5 and (group == 1) == bool((fetched == 5).all())


def test_equal_scores_go_to_the_earlier_token() -> None:
    shape = make_shape(layers=1)
    rows = PerHeadRows(shape, 1 << 20)
    for kernels in (native_kernels(), TorchKernels()):
        rows.open(0)
        assert rows.reserve(0, 30)
        spans = torch.tensor([[0, 0, 30]], dtype=torch.int32)
        v = torch.arange(30.0)[:, None, None].expand(30, 2, 16).contiguous()
        kernels.write(rows.call(0, spans), torch.zeros(30, 2, 16), v)
        rows.length[0], spans[0, 2] = 29, 1
        out, _, fetched = kernels.attend_top(rows.call(0, spans), torch.ones(1, 4, 16), 3, True)
        assert torch.allclose(out, torch.ones(())) and (fetched == 3).all(), "the mean of 0, 1 and 2"
        rows.close(0)


def test_a_step_may_hold_prompts_and_generated_rows() -> None:
    """Values of the one on the device, of the other in host memory."""
    cache, content = new_cache("kcache:n=4"), [Text(1), Text(2)]
    alone = new_cache("kcache:n=4")
    first, second = cache.open(40), cache.open(60)
    other = [alone.open(40), alone.open(60)]
    prefill(cache, first, content[0], 0)
    prefill(alone, other[0], content[0], 0)
    got = step(cache, [(first, content[0], 1, 0), (second, content[1], 60, 0)])
    expected = step(alone, [(other[0], content[0], 1, 0)]) + step(alone, [(other[1], content[1], 60, 0)])
    for x, y in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


# --- SentenceKV

SENTENCES = "sentencekv:budget=20,semantic_factor=2,first=4,last=8,window=8,max_sentence=12"
FULL_STOP = 7


def test_sentencekv_retrieves_what_its_dense_twin_does_and_moves_no_row_twice() -> None:
    """With sentences of several lengths, some ended by a token and some cut; also rows moved, one by one."""
    context, continuation = text(90, 3), text(60, 4)
    for at in (10, 11, 25, 60):
        context[at] = FULL_STOP
    for at in (5, 6, 20, 40):
        continuation[at] = FULL_STOP
    for ends in ((), (FULL_STOP,)):
        twin = DenseSentenceKV(tokens=context + continuation, ends=ends)
        expected = score(small_model(), twin, context, continuation)
        engine = make_engine(SENTENCES)
        engine.cache.ends = frozenset(ends)  # type: ignore[attr-defined]
        [scored] = engine.score([(context, continuation)])
        assert scored.logprobs == pytest.approx(expected, abs=1e-4)
        assert engine.stats().kv_bytes_fetched == twin.crossed * 2 * HALF_ROW
        longest = max(map(len, twin.sentences))
        assert longest == 12 and (len(twin.sentences) > 14) == bool(ends)


def test_sentencekv_holds_a_budget_on_the_device_however_long_the_text() -> None:
    engine = make_engine(SENTENCES)
    request = feed(engine, text(300), text(90, 1))
    assert request.sequence is not None
    device, host = engine.cache.held_by(request.sequence), engine.cache.host_held_by(request.sequence)
    rows, vectors = LAYERS * G * 32 * 2 * HALF_ROW, LAYERS * G * HALF_ROW * (25 + 90 // 12 + 2)
    assert device == rows + vectors
    kept = 40 + 90
    assert host == LAYERS * G * (144 * 2 * HALF_ROW + kept * 4), "whole pages, and a number a row"
    assert engine.stats().kv_bytes_host == host == request.metrics.kv_bytes_host
    engine.cancel([request])
    assert engine.stats().kv_bytes_held == engine.stats().kv_bytes_host == 0


def test_a_budget_that_holds_the_text_moves_nothing_after_the_prompt() -> None:
    engine = make_engine("sentencekv:budget=500,first=4,last=200")
    engine.generate([text(150)], params())
    assert engine.stats().kv_bytes_fetched == 0


def test_sentences_end_where_readers_see_them_end() -> None:
    model = trimtab.load()
    ends = sentence_ends(model.tokenizer)
    assert model.tokenizer is not None
    size = model.tokenizer.vocab_size
    for i in range(size):
        piece = model.tokenizer.decode([i], skip_special_tokens=False)
        if piece in (".", "!", "?", "\n", "\n\n", '."', "...", "。"):
            assert i in ends, piece
        if piece.strip().isalnum() or piece in (",", ";", " "):
            assert i not in ends, piece
    assert 3 < len(ends) < size / 4
    assert sentence_ends(None) == frozenset()
    assert make_engine("sentencekv", model=model).cache.ends == ends  # type: ignore[attr-defined]


# --- host memory


@pytest.mark.parametrize(
    "cache",
    [LOSSY["kcache"], LOSSY["sentencekv"], "rtn:bits=4,group_size=16,residual=150+kcache:n=4"],
)
def test_tight_host_memory_preempts_and_changes_nothing(cache: str) -> None:
    largest, alone = 0, []
    for prompt in PROMPTS:
        engine = make_engine(cache)
        [request] = engine.submit(prompt, params())
        while engine.scheduler.has_work:
            engine.step()
            largest = max(largest, engine.stats().kv_bytes_host, request.metrics.kv_bytes_host)
        alone += results(engine, [prompt])
    engine = make_engine(f"{cache},host_memory={int(largest * 1.3)}")
    assert results(engine) == alone
    assert engine.stats().preemptions > 0 and engine.stats().kv_bytes_host == 0


@pytest.mark.parametrize("name", ["kcache", "sentencekv"])
def test_too_little_host_memory_is_one_clear_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'host_memory' of {name} is 100 B, less than one page"):
        make_engine(f"{name}:host_memory=100")
    with pytest.raises(ConfigError, match=f"'host_memory' of {name} is 'plenty'; write bytes"):
        make_engine(f"{name}:host_memory=plenty")
    engine = make_engine(f"{name}:host_memory=20KiB")
    with pytest.raises(
        RequestError, match=f"'host_memory' of {name} is 20.0 KiB, too little for one request"
    ):
        engine.generate([text(300)], params())
    assert engine.stats().kv_bytes_held == engine.stats().kv_bytes_host == 0
    assert len(engine.generate([text(20)], params(max_tokens=2))) == 1, "and shorter texts go on"


@pytest.mark.parametrize(
    "cache, message",
    [
        ("kcache:n=0", "'n' of kcache is 0"),
        ("kcache:full_layers=-1", "'full_layers' of kcache is -1"),
        ("kcache:full_layers=2", "the model has 2 layers"),
        ("streaming+kcache", "streaming cannot be combined with kcache"),
        (
            "kivi:group_size=16+kcache:full_layers=1",
            "kcache:full_layers=1 keeps those layers' values in full",
        ),
        ("rtn:group_size=16,prefill=64+kcache", "prefill=64 packs the prompt as it comes, and kcache"),
        ("kcache:n=3+kcache:n=4", "both decide where rows are kept"),
        ("sentencekv:budget=64", "'budget' of sentencekv is 64, but first . last are already 64 rows"),
        ("sentencekv:budget=128,semantic_factor=0.5", "'semantic_factor' of sentencekv is 0.5"),
        ("sentencekv:kernel=4", "'kernel' of sentencekv is 4; it must be odd"),
        ("sentencekv:max_sentence=0", "'max_sentence' of sentencekv is 0"),
        ("sentencekv:last=0", "'last' of sentencekv is 0"),
        ("snapkv+sentencekv", "sentencekv cannot be combined with snapkv"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(cache: str, message: str) -> None:
    with pytest.raises((ConfigError, PlanError), match=message):
        make_engine(cache)


def test_perplexity_reports_host_memory_beside_the_devices() -> None:
    task = "perplexity:context=64,stride=16,windows=1"
    config = trimtab.load().config
    report = trimtab.compare(None, plans=["full", "kcache:n=4"], tasks=[task])
    full, kcache = ({k: m.value or 0 for k, m in row.metrics.items()} for row in report.rows)
    assert "kv_bytes_host" not in full
    assert kcache["kv_bytes_host"] == kcache["kv_bytes_held"] == full["kv_bytes_held"] / 2
    # Between n and n times the group's heads, values of 2 bytes; the last of the 16 scored tokens is never
    # computed.
    row = config.num_layers * config.num_kv_heads * config.head_dim * 2
    group = config.num_heads // config.num_kv_heads
    assert 4 * row * 15 / 16 <= kcache["kv_bytes_fetched"] <= 4 * group * row * 15 / 16


@pytest.mark.slow
def test_sentences_brought_back_find_what_eviction_dropped() -> None:
    """As many rows attended to in each step; what SnapKV dropped is gone, here it lies in host memory."""
    cases = haystacks((0.0, 0.25, 0.5, 0.75), 450, 3)
    sentences = found("sentencekv:budget=128,first=16,last=16,window=8,semantic_factor=2", cases)
    assert sentences >= 0.75
    assert sentences >= found("snapkv:budget=128,window=8", cases) + 0.15
    assert sentences >= found("streaming:sinks=16,window=112", cases) + 0.3
    assert found("kcache:n=16", cases) >= 0.75
