"""Every policy against its dense twin: prompts of several lengths, then decoding far past every budget."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from kvcache.dense import (
    Dense,
    DenseH2O,
    DenseH2OInRtn,
    DenseKivi,
    DenseRtn,
    DenseSnapKV,
    DenseSnapKVInKivi,
    DenseStreaming,
    score,
)
from kvcache.dense_kvquant import DenseKVQuant
from kvcache.dense_offload import (
    DenseH2OInRtnOnKCache,
    DenseH2OOnKCache,
    DenseKCache,
    DenseKiviOnKCache,
    DenseRtnOnKCache,
    DenseSentenceKV,
    DenseSnapKVInKiviOnKCache,
    DenseSnapKVOnKCache,
)
from kvcache.dense_retrieval import DenseRetrievalHeads
from kvcache.dense_rotatekv import DenseRotateKV
from kvcache.dense_scored import DenseExpected, DenseVotes
from kvcache.policies import LOSSY, both_backends, make_engine, small_model, text
from trimtab.attachment import Attachment, Attachments
from trimtab.kernels.nuq import NuqCodec
from trimtab.kvcache.kvquant import KVQuant


def kvquant() -> Attachment:
    return Attachments(small_model()).get("kvquant")


def room(name: str) -> int:
    """Keys that a list of outliers holds."""
    cache = make_engine(LOSSY[name], "torch").cache
    assert isinstance(cache, KVQuant) and isinstance(cache.rows.tables.codec, NuqCodec)
    return cache.rows.tables.codec.k_most


TWINS: dict[str, Callable[[], Dense]] = {
    "full": Dense,
    "streaming": lambda: DenseStreaming(sinks=4, window=28),
    "streaming, wide": lambda: DenseStreaming(sinks=20, window=100),
    "streaming, window only": lambda: DenseStreaming(sinks=0, window=33),
    "kivi 2 bits": lambda: DenseKivi(bits=2, group=16, residual=32),
    "kivi 4 bits": lambda: DenseKivi(bits=4, group=16, residual=16),
    "kivi 3 bits, small groups": lambda: DenseKivi(bits=3, group=8, residual=24),
    "kivi 8 bits, as it comes": lambda: DenseKivi(bits=8, group=4, residual=20, chunk=48),
    "rtn 2 bits": lambda: DenseRtn(bits=2, group=16),
    "rtn 4 bits, small groups": lambda: DenseRtn(bits=4, group=8, residual=10),
    "rtn 3 bits, as it comes": lambda: DenseRtn(bits=3, group=16, chunk=40),
    "snapkv + kivi": lambda: DenseSnapKVInKivi(bits=2, group=16, residual=16, budget=48, window=16),
    "h2o + rtn": lambda: DenseH2OInRtn(bits=4, group=16, budget=40, recent=20),
    "h2o": lambda: DenseH2O(budget=40, recent=20),
    "h2o, mostly heavy": lambda: DenseH2O(budget=33, recent=3),
    "snapkv": lambda: DenseSnapKV(budget=48, window=16),
    "kvquant 2 bits": lambda: DenseKVQuant(
        attachment=kvquant(), bits=2, sinks=0, q_norm=True, room=room("kvquant 2 bits")
    ),
    "kvquant 3 bits": lambda: DenseKVQuant(attachment=kvquant(), sinks=5, room=room("kvquant 3 bits")),
    "kvquant 4 bits, dense": lambda: DenseKVQuant(attachment=kvquant(), bits=4, outliers=0, sinks=0),
    "kvquant, late and even": lambda: DenseKVQuant(
        attachment=kvquant(), sinks=0, nuq=False, pre_rope=False, room=room("kvquant, late and even")
    ),
    "rotatekv 2 bits": lambda: DenseRotateKV(bits=2, group=16, clip=0.8, sinks=3),
    "rotatekv 3 bits, folded": lambda: DenseRotateKV(bits=3, group=32, heads=1),
    "snapkv, max": lambda: DenseSnapKV(budget=40, window=5, kernel=7, pooling="max"),
    "sentencekv": DenseSentenceKV,
    "sentencekv, one sentence at a time": lambda: DenseSentenceKV(
        budget=33, factor=1, first=0, last=1, window=5, kernel=1, max_sentence=40
    ),
    "kcache": lambda: DenseKCache(n=4),
    "kcache, renormalized": lambda: DenseKCache(n=3, renormalize=True, full_layers=1),
    "snapkv + kcache": lambda: DenseSnapKVOnKCache(n=4, budget=48, window=16),
    "h2o + kcache": lambda: DenseH2OOnKCache(n=4, budget=40, recent=20),
    "kivi + kcache": lambda: DenseKiviOnKCache(n=4, bits=4, group=16, residual=16),
    "rtn + kcache": lambda: DenseRtnOnKCache(n=3, renormalize=True, bits=3, group=8, residual=10),
    "snapkv + kivi + kcache": lambda: DenseSnapKVInKiviOnKCache(
        n=5, bits=2, group=16, residual=32, budget=80, window=16
    ),
    "h2o + rtn + kcache": lambda: DenseH2OInRtnOnKCache(n=4, bits=4, group=16, budget=40, recent=20),
    "retrieval heads": lambda: DenseRetrievalHeads(whole=((0, 1),), sinks=4, window=28),
    "retrieval heads, none kept": lambda: DenseRetrievalHeads(sinks=20, window=5),
    "h2o in chunks": lambda: DenseH2O(percent=45, chunk=24),
    "snapkv in chunks": lambda: DenseVotes(budget=lambda n: 40, window=8, chunk=32, interval=10),
    "expected attention": lambda: DenseExpected(budget=lambda n: max(3, n * 40 // 100), sinks=2, future=64),
    "expected attention in chunks": lambda: DenseExpected(
        budget=lambda n: 36, future=32, epsilon=0.01, chunk=20, interval=9
    ),
    "adakv": lambda: DenseVotes(budget=lambda n: 40, window=8, kernel=3, safeguard=0.2),
    "adakv in chunks": lambda: DenseExpected(
        budget=lambda n: max(5, n * 30 // 100), safeguard=0.5, chunk=40, interval=9
    ),
}
# The ablation with logical positions has no twin of its own: it is the full cache with rows hidden.
PAIRS = [(text(n, n), text(m, n + 1)) for n, m in ((1, 70), (64, 40), (100, 50))]


@functools.cache
def truth(name: str) -> torch.Tensor:
    """The twin's log-probabilities of all continuations, one after another."""
    return torch.tensor([x for pair in PAIRS for x in score(small_model(), TWINS[name](), *pair)])


def test_every_policy_has_a_twin() -> None:
    assert set(LOSSY) - set(TWINS) == {"streaming, logical positions"}


@pytest.mark.parametrize(("backend", "name"), both_backends(TWINS))
def test_scores_are_those_of_the_dense_twin(backend: str, name: str) -> None:
    scored = make_engine(LOSSY[name], backend, max_step_tokens=33).score(PAIRS)
    got = torch.tensor([x for s in scored for x in s.logprobs])
    difference = (got - truth(name)).abs()
    if any(packer in name for packer in ("kivi", "kvquant", "rotatekv", "rtn")):
        # A last bit may tip a code over, which moves later tokens a bit.
        assert difference.quantile(0.9) < 1e-3 and difference.mean() < 5e-3
    else:
        assert difference.max() < 1e-4
    # Agreeing with a twin says little where the twin is like the full cache.
    assert ((truth(name) - truth("full")).abs().mean() > 0.005) == (name != "full")


def test_logical_positions_are_the_full_cache_with_rows_hidden() -> None:
    class Hidden(Dense):
        def see(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            total = self.k[layer].shape[1]
            kept = [i for i in range(total) if i < 20 or i >= total - 16]
            return self.k[layer][:, kept], self.v[layer][:, kept]

    for pair, got in zip(PAIRS, make_engine(LOSSY["streaming, logical positions"]).score(PAIRS), strict=True):
        assert got.logprobs == pytest.approx(score(small_model(), Hidden(), *pair), abs=1e-4)
