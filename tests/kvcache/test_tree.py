"""A tree of drafts: the accepted path is kept as if nothing else had been proposed, wherever it lies."""

from __future__ import annotations

import pytest
import torch

import trimtab
from kernels.libraries import native_kernels
from kvcache.policies import LOSSY, SETTINGS, small_model
from kvcache.test_protocol import LAYERS, Text, prefill, step
from trimtab.engine.setup import build_cache
from trimtab.kernels.reference import TorchKernels
from trimtab.kvcache.base import KVCache, Sequence, StepRows

# Row 0 is the pending token; 1 and 4 are wrong; 0, 2, 3 is the accepted path.
PARENT = [-1, 0, 0, 2, 1]
PATH = [0, 2, 3]


def visible() -> torch.Tensor:
    n = len(PARENT)
    mask = torch.zeros(n, n, dtype=torch.uint8)
    for row in range(n):
        at = row
        while at >= 0:
            mask[row, at] = 1
            at = PARENT[at]
    return mask


def tree_step(cache: KVCache, work: list[tuple[Sequence, Text]]) -> list[list[torch.Tensor]]:
    """One step in which every text brings the tree; outputs of the accepted rows [span][layer]."""
    n = len(PARENT)
    depth = [sum(visible()[row].tolist()) - 1 for row in range(n)]
    positions = torch.tensor([s.length + d for s, _ in work for d in depth])
    cos, sin = small_model().rotary.cos_sin(positions)
    for sequence, _ in work:
        assert cache.reserve(sequence, n)
    spans = torch.tensor([[s.slot, i * n, (i + 1) * n] for i, (s, _) in enumerate(work)], dtype=torch.int32)
    rows = StepRows(
        sequences=[s for s, _ in work],
        spans=spans,
        positions=positions,
        cos=cos,
        sin=sin,
        mask=visible().flatten().repeat(len(work)),
        bounds=[(i * n, (i + 1) * n) for i in range(len(work))],
    )
    cache.begin(rows)
    outs: list[list[torch.Tensor]] = [[] for _ in work]
    for layer in range(LAYERS):
        parts = []
        for sequence, text in work:
            at = [sequence.length + d for d in depth]
            q, k, v = text.rows(layer, at, 0)
            for wrong in set(range(n)) - set(PATH):
                q[wrong], k[wrong], v[wrong] = 3.0, -5.0, 9.0
            parts.append((q, k, v))
        q, k, v = (torch.cat([p[i] for p in parts]).contiguous() for i in range(3))
        cache.layer_input(layer, k.flatten(1), rows)
        out = cache.attend(layer, q, k, v, rows)
        for i in range(len(work)):
            outs[i].append(out[i * n : (i + 1) * n][PATH].clone())
    for i in range(len(work)):
        cache.arrange(rows, i, PATH)
    cache.commit(rows, [len(PATH)] * len(work))
    cache.check()
    return outs


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_path_through_a_tree_equals_the_chain(name: str, backend: str) -> None:
    kernels = native_kernels() if backend == "native" else TorchKernels()
    plan = trimtab.Plan(cache=LOSSY[name], kv_memory="4MiB", max_batch=2, max_step_tokens=128)
    branched, chain = build_cache(small_model(), plan, kernels), build_cache(small_model(), plan, kernels)
    texts = [Text(8), Text(9)]
    mine = [branched.open(n) for n in (90, 45)]
    other = [chain.open(n) for n in (90, 45)]
    for a, b, t in zip(mine, other, texts, strict=True):
        prefill(branched, a, t, 0)
        prefill(chain, b, t, 0)
    for _ in range(15):
        got = tree_step(branched, list(zip(mine, texts, strict=True)))
        # Policies that act after every token must be fed one at a time; within a tree they act after it.
        expected = step(chain, [(s, t, len(PATH), 0) for s, t in zip(other, texts, strict=True)])
        for x, y in zip(got, expected, strict=True):
            for a, b in zip(x, y, strict=True):
                torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)
    for a, b in zip(mine, other, strict=True):
        assert a.length == b.length
        assert branched.read_per_step(a) == chain.read_per_step(b)
