"""The matrix of cache policies: small settings that make every one of them forget, pack or evict.

A new policy needs a row in `LOSSY` and one in `IDENTITY`; `test_matrix` fails without.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from kernels.libraries import native_kernels
from trimtab.calibration.base import fit
from trimtab.engine.request import Request
from trimtab.models.shapes import random_model, shape
from trimtab.models.transformer import Model

CONTEXT = 600

# Settings under which a text of a few dozen tokens already loses something (`full` never does).
LOSSY = {
    "full": "full",
    "streaming": "streaming:sinks=4,window=28",
    "streaming, wide": "streaming:sinks=20,window=100",
    "streaming, window only": "streaming:sinks=0,window=33",
    "streaming, logical positions": "streaming:sinks=20,window=16,positions=logical",
    "kivi 2 bits": "kivi:bits=2,group_size=16,residual=32",
    "kivi 4 bits": "kivi:bits=4,group_size=16,residual=16",
    "kivi 3 bits, small groups": "kivi:bits=3,group_size=8,residual=24",
    "kivi 8 bits, as it comes": "kivi:bits=8,group_size=4,residual=20,prefill=48",
    "rtn 2 bits": "rtn:bits=2,group_size=16",
    "rtn 4 bits, small groups": "rtn:bits=4,group_size=8,residual=10",
    "rtn 3 bits, as it comes": "rtn:bits=3,group_size=16,prefill=40",
    "h2o": "h2o:budget=40",
    "h2o, mostly heavy": "h2o:budget=33,recent=0.1",
    "snapkv": "snapkv:budget=48,window=16",
    "snapkv, max": "snapkv:budget=40,window=5,kernel=7,pooling=max",
    "snapkv + kivi": "snapkv:budget=48,window=16+kivi:bits=2,group_size=16,residual=16",
    "h2o + rtn": "h2o:budget=40+rtn:bits=4,group_size=16",
    "sentencekv": "sentencekv:budget=20,semantic_factor=2,first=4,last=8,window=8,max_sentence=12",
    "sentencekv, one sentence at a time": "sentencekv:budget=33,semantic_factor=1,first=0,last=1,window=5,"
    "kernel=1,max_sentence=40",
    "kcache": "kcache:n=4",
    "kcache, renormalized": "kcache:n=3,renormalize=true,full_layers=1",
    "snapkv + kcache": "snapkv:budget=48,window=16+kcache:n=4",
    "h2o + kcache": "h2o:budget=40+kcache:n=4",
    "kivi + kcache": "kivi:bits=4,group_size=16,residual=16+kcache:n=4",
    "rtn + kcache": "rtn:bits=3,group_size=8,residual=10+kcache:n=3,renormalize=true",
    "snapkv + kivi + kcache": "snapkv:budget=80,window=16+kivi:bits=2,group_size=16,residual=32+kcache:n=5",
    "h2o + rtn + kcache": "h2o:budget=40+rtn:bits=4,group_size=16+kcache:n=4",
    "kvquant 2 bits": "kvquant:bits=2,headroom=6,sinks=0",
    "kvquant 3 bits": "kvquant:bits=3,headroom=10,sinks=5",
    "kvquant 4 bits, dense": "kvquant:bits=4,outliers=0,sinks=0",
    "kvquant, late and even": "kvquant:bits=3,sinks=0,nuq=false,pre_rope=false",
    "h2o in chunks": "h2o:budget=45%,chunk=24",
    "snapkv in chunks": "snapkv:budget=40,window=8,chunk=32,interval=10",
    "expected attention": "expected_attention:budget=40%,sinks=2,future=64",
    "expected attention in chunks": "expected_attention:budget=36,future=32,epsilon=0.01,chunk=20,interval=9",
    "adakv": "adakv:budget=40,scorer='snapkv:window=8,kernel=3'",
    "adakv in chunks": "adakv:budget=30%,scorer=expected_attention,safeguard=0.5,chunk=40,interval=9",
    "rotatekv 2 bits": "rotatekv:bits=2,group_size=16,sinks=3,reorder=false",
    "rotatekv 3 bits, folded": "rotatekv:bits=3,group_size=32,heads=1,sinks=0,reorder=false,fold=true",
    "retrieval heads": "retrieval_heads:heads=0-1,sinks=4,window=28",
    "retrieval heads, none kept": "retrieval_heads:keep=0,sinks=20,window=5",
}

# Further settings of a policy above: the whole matrix over them is slow; other tests take them all.
VARIANTS = {
    "streaming, wide",
    "streaming, window only",
    "kivi 4 bits",
    "kivi 8 bits, as it comes",
    "rtn 2 bits",
    "rtn 4 bits, small groups",
    "h2o, mostly heavy",
    "snapkv, max",
    "sentencekv, one sentence at a time",
    "kcache, renormalized",
    "h2o + kcache",
    "rtn + kcache",
    "h2o + rtn + kcache",
    "snapkv + kivi + kcache",
    "kvquant 2 bits",
    "kvquant 4 bits, dense",
    "kvquant, late and even",
    "expected attention",
    "adakv",
    "rotatekv 3 bits, folded",
    "retrieval heads, none kept",
}

# For tests that take long over all of them.
SETTINGS = [pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in LOSSY]

# One setting of each policy: what plain torch, which takes longest, is asked among the fast tests.
PLAINEST = {cache.split(":")[0]: name for name, cache in reversed(LOSSY.items())}.values()


def both_backends(names: Iterable[str]) -> list[Any]:
    """(backend, name) pairs, the rare and long ones marked as slow."""
    fast = {"native": set(LOSSY) - VARIANTS, "torch": set(PLAINEST)}
    return [
        pytest.param(backend, name, marks=[] if name in fast[backend] else [pytest.mark.slow])
        for name in names
        for backend in ("native", "torch")
    ]

# Settings that lose nothing of a text within the context.
IDENTITY = {
    "full": "full",
    "streaming": f"streaming:sinks=4,window={CONTEXT - 4}",
    "kivi": "kivi:bits=16,group_size=16,residual=32",
    "rtn": "rtn:bits=16,group_size=16",
    "h2o": "h2o:budget=10000",
    "snapkv": "snapkv:budget=10000,window=5",
    "kcache": "kcache:n=10000",
    "kvquant": "kvquant:bits=16",
    "sentencekv": "sentencekv:budget=10000",
    "expected_attention": "expected_attention:budget=100%",
    "adakv": "adakv:budget=100%,chunk=16",
    "rotatekv": "rotatekv:bits=16,reorder=false",
    "retrieval_heads": "retrieval_heads:heads=0-0+0-1+1-0+1-1,window=1",
}


def put_attachments(model: Model) -> None:
    """Give a model of 160 tokens a folder with what is fitted for it."""
    model.path = folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    lines = [json.dumps({"tokens": text(500, seed)}) for seed in range(4)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    made = fit("kvquant", model, str(folder / "texts.jsonl"), {"sequences": 4, "tokens": 200})
    # Keys of the first layer depend on the token alone: a threshold would lie on a token's very key. And
    # with more outliers lists overflow.
    made.tensors["k_range"].mul_(0.6)
    made.save(folder / "attachments" / "kvquant")


@functools.cache
def small_model(dtype: torch.dtype = torch.float32) -> Model:
    """Two layers, four query heads on two KV heads of 16; attention peaked enough that rows matter."""
    config = shape(
        "125m",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        max_position_embeddings=CONTEXT,
    )
    model = random_model(config, seed=3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 3  # type: ignore[union-attr]
            layer.self_attn.v_proj.weight *= 2  # type: ignore[union-attr]
        model.model.embed_tokens.weight *= 2
    put_attachments(model.to(dtype))
    return model


def make_engine(
    cache: str, backend: str = "native", model: Model | None = None, **options: Any
) -> trimtab.Engine:
    model = model or small_model()
    if backend == "native":
        native_kernels(model.dtype)
    settings = dict(max_batch=8, threads=1, kv_memory="16MiB") | options
    return trimtab.Engine(model, cache=cache, backend=backend, **settings)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [text(n, seed=n) for n in (1, 16, 47, 90, 131, 200)]


def params(**changes: Any) -> trimtab.SamplingParams:
    return trimtab.SamplingParams(
        **(dict(max_tokens=40, temperature=1.0, seed=11, ignore_eos=True, logprobs=0) | changes)
    )


Result = tuple[list[int], list[float]]


def results(engine: trimtab.Engine, prompts: list[list[int]] = PROMPTS, **changes: Any) -> list[Result]:
    """Token ids and log-probabilities of each prompt's seeded text."""
    outputs = engine.generate(prompts, params(**changes))
    assert engine.cache.bytes_held == 0
    return [(o.token_ids, [x.logprob for x in o.logprobs or ()]) for o in outputs]


@functools.cache
def undisturbed(name: str) -> list[Result]:
    """Each prompt alone and whole on the C++ kernels: every other way of running must give these bits."""
    engine = make_engine(LOSSY[name], prefix_caching=False)
    return [results(engine, [p])[0] for p in PROMPTS]


def feed(engine: trimtab.Engine, tokens: list[int], continuation: list[int] | None = None) -> Request:
    """A request whose tokens are all computed and which is still running."""
    [request] = engine.submit(tokens, params(max_tokens=100))
    steps = len(continuation or ())
    while request.computed < len(tokens):
        engine.step()
    for i in range(steps):
        assert request.computed == len(tokens) + i
        engine.step()
    return request
