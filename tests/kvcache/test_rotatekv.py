"""RotateKV: folding changes nothing, sinks stay whole, and each part of the method earns its place."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch

import trimtab
from kvcache.outliers import with_outliers
from kvcache.policies import feed, make_engine, params, small_model, text
from kvcache.test_signatures import SINK, model_with_a_sink
from trimtab.attachment import Attachment, Base
from trimtab.calibration.base import fit
from trimtab.errors import ConfigError, PlanError
from trimtab.evaluation.corpus import shipped_text
from trimtab.kvcache.rotatekv import RotateKV, key_block
from trimtab.models.config import config_from_dict
from trimtab.models.folding import fold_rotation
from trimtab.models.shapes import random_model
from trimtab.models.transformer import Model


@functools.cache
def shipped() -> Model:
    return trimtab.load(dtype="float32")


@functools.cache
def outlying() -> Model:
    return with_outliers(shipped())


@functools.cache
def book() -> list[int]:
    assert shipped().tokenizer is not None
    return shipped().tokenizer.encode(shipped_text()[:40_000])  # type: ignore[union-attr]


def family(kind: str) -> Model:
    """A small random model with biases (qwen2) or with norms on queries and keys (qwen3)."""
    raw = dict(
        architectures=[f"Q{kind[1:]}ForCausalLM"],
        model_type=kind,
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
    )
    model = random_model(config_from_dict(raw), seed=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "_norm.weight" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    return model


# --- folding


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_folded_weights_are_the_same_function(kind: str, backend: str, tmp_path: Path) -> None:
    """A prompt is attended in full precision, so its log-probabilities are those of the model as it was."""
    model = small_model() if kind == "llama" else family(kind)
    base = Attachment("rotatekv", Base.of(model), {"order": shuffled(2, 32)}, {"heads": 4})
    folder = base.save(tmp_path / "order")
    found = []
    for cache in ("full", f"rotatekv:bits=4,group_size=32,fold=true,attachment={folder}"):
        engine = make_engine(cache, backend, model, max_step_tokens=33)
        outs = engine.generate([text(n, n) for n in (5, 70)], params(max_tokens=1, prompt_logprobs=0))
        found.append([x.logprob for out in outs for x in (out.prompt_logprobs or ()) if x is not None])
    assert len(found[0]) == 4 + 69
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def shuffled(layers: int, width: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(width, generator=g) for _ in range(layers)])


@torch.no_grad()
def test_values_may_be_folded_by_themselves() -> None:
    """Then nothing is left to be undone: the plain model gives the same logits."""
    folded = fold_rotation(shipped(), 1, 64)
    tokens = torch.tensor([book()[:200]])
    torch.testing.assert_close(folded(tokens), shipped()(tokens), atol=2e-4, rtol=1e-4)
    for name, weight in shipped().state_dict().items():
        mine = folded.state_dict()[name]
        assert ("v_proj" in name or "o_proj" in name) == (not torch.equal(mine, weight)), name


def test_the_outliers_change_nothing_by_themselves() -> None:
    tokens = torch.tensor([book()[:200]])
    with torch.no_grad():
        torch.testing.assert_close(outlying()(tokens), shipped()(tokens), atol=2e-3, rtol=1e-3)
    name = "model.layers.0.self_attn.k_proj.weight"
    keys = [model.state_dict()[name].norm(dim=1) for model in (shipped(), outlying())]
    assert int(((keys[1] / keys[0]) > 19).sum()) == 8, "four channels in each of two heads"


# --- rotations


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "heads", "block"),
    [(8, 128, 4, 512), (2, 64, 4, 128), (6, 64, 4, 64), (8, 96, 4, 128), (1, 80, 4, 16)],
)
def test_as_many_heads_as_fit_are_rotated_together(
    kv_heads: int, head_dim: int, heads: int, block: int
) -> None:
    assert key_block(kv_heads, head_dim, heads) == block


# --- sinks


def test_tokens_of_large_activations_stay_in_full() -> None:
    model = small_model.__wrapped__()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 30
    prompt = text(60, 1)
    prompt = [t if t != 7 else 8 for t in prompt]
    prompt[11] = prompt[40] = 7
    engine = make_engine("rotatekv:bits=2,group_size=32,reorder=false", model=model, max_step_tokens=25)
    request = feed(engine, prompt)
    cache = engine.cache
    assert isinstance(cache, RotateKV) and request.sequence is not None
    slot, t = request.sequence.slot, cache.rows.tables
    assert t.kept_count[slot].tolist() == [2, 2]
    assert t.kept_at[slot, :, :2].tolist() == [[11, 40]] * 2
    assert cache.pools["kept"].used == 4, "what was reserved for others is given back"
    assert cache.pools["notes"].used == 0
    engine.cancel([request])
    assert cache.bytes_held == 0


# --- quality


def loss(cache: str, model: Model) -> float:
    """Mean over texts of which the first 150 tokens are the prompt."""
    starts = (0, 2000, 5000)
    pairs = [(book()[i : i + 150], book()[i + 150 : i + 350]) for i in starts]
    scored = make_engine(cache, model=model, kv_memory="64MiB", max_batch=16).score(pairs)
    losses = [-x for s in scored for x in s.logprobs]
    return math.fsum(losses) / len(losses)


NEAREST = "rotation=false,reorder=false,sinks=0,clip=1"


@pytest.mark.slow
def test_two_bits_are_clearly_better_than_rounding_to_nearest() -> None:
    for model in (shipped(), outlying()):
        full = loss("full", model)
        nearest = loss(f"rotatekv:bits=2,{NEAREST}", model) - full
        rotated = loss("rotatekv:bits=2,reorder=false", model) - full
        assert 0 < rotated < 0.75 * nearest


@pytest.mark.slow
def test_every_part_earns_its_place(tmp_path: Path) -> None:
    """Two bits on a model with outlying channels, two groups a token so that order matters. The model has
    no attention sinks, so keeping some tokens changes little; the next test has one that does.

    An order of channels exists before rotary embedding alone: behind it every channel's sum is about nothing.
    That is what keys gain by being stored before it; a rotation alone is as good behind it on this model.
    """
    model = outlying()
    order = fit("rotatekv", model, "shipped", {"sequences": 4, "tokens": 512}).save(tmp_path / "order")
    full = loss("full", model)
    cost = {
        name: loss(f"rotatekv:bits=2,group_size=64,{options}", model) - full
        for name, options in {
            "nearest": NEAREST,
            "rotated": "heads=1,reorder=false,sinks=0",
            "grouped": "heads=2,reorder=false,sinks=0",
            "reordered": f"heads=2,sinks=0,attachment={order}",
            "sinks": f"heads=2,attachment={order}",
            "after rope": "heads=2,pre_rope=false,reorder=false,sinks=0",
        }.items()
    }
    assert cost["nearest"] > 1.15 * cost["rotated"]
    assert cost["rotated"] > cost["grouped"] > 1.25 * cost["reordered"]
    assert cost["sinks"] == pytest.approx(cost["reordered"], rel=0.1)
    assert cost["after rope"] > 1.25 * cost["reordered"]


def test_sinks_in_full_save_a_model_that_rests_on_them() -> None:
    model = model_with_a_sink()
    g = torch.Generator().manual_seed(3)
    tokens = [SINK, *torch.randint(1, 96, (160,), generator=g).tolist()]

    def logprobs(cache: str) -> torch.Tensor:
        return torch.tensor(make_engine(cache, model=model).score([(tokens[:60], tokens[60:])])[0].logprobs)

    full = logprobs("full")
    with_sinks, without = (
        (logprobs(f"rotatekv:bits=2,group_size=32,reorder=false,sinks={n}") - full).abs().mean()
        for n in (20, 0)
    )
    assert with_sinks < 0.7 * without


# --- bad input


@pytest.mark.parametrize(
    ("cache", "error", "named"),
    [
        ("rotatekv:group_size=48,reorder=false", PlanError, "group_size 48"),
        ("rotatekv:group_size=20", ConfigError, "multiple of 16"),
        ("rotatekv:group_size=32", ConfigError, "rotatekv:reorder=false"),
        ("rotatekv:group_size=32,attachment=/nowhere", ConfigError, "trimtab attach rotatekv"),
        ("rotatekv:clip=1.5", ConfigError, "'clip'"),
        ("rotatekv:sinks=-1", ConfigError, "'sinks'"),
        ("rotatekv:rotation=false,reorder=false,fold=true", ConfigError, "fold=false"),
        ("rotatekv:pre_rope=false", ConfigError, "reorder=false"),
    ],
)
def test_mistakes_are_named(cache: str, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        make_engine(cache)


def test_an_order_for_other_rotations_is_refused(tmp_path: Path) -> None:
    base = Base.of(small_model())
    folder = Attachment("rotatekv", base, {"order": shuffled(2, 32)}, {"heads": 1}).save(tmp_path / "one")
    with pytest.raises(ConfigError, match="give heads=1"):
        make_engine(f"rotatekv:group_size=32,attachment={folder}")
    make_engine(f"rotatekv:group_size=32,heads=1,attachment={folder}")
    twice = torch.zeros(2, 32, dtype=torch.int64)
    folder = Attachment("rotatekv", base, {"order": twice}, {"heads": 4}).save(tmp_path / "two")
    with pytest.raises(ConfigError, match="not an order"):
        make_engine(f"rotatekv:group_size=32,attachment={folder}")
