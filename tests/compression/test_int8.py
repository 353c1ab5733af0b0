"""Int8 weights: the codes, the model made of them, and that they run alike everywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from kernels.libraries import native_kernels
from models.tiny_models import CASES, make, texts
from trimtab.compression import int8
from trimtab.compression.int8 import Int8, quantize
from trimtab.errors import ConfigError
from trimtab.evaluation.corpus import shipped_text
from trimtab.models import costs, lora
from trimtab.models.folding import fold_rotation
from trimtab.models.save import save
from trimtab.models.shapes import random_model, shape
from trimtab.models.transformer import Model
from trimtab.plan import Plan
from trimtab.registry import NoOptions

FOLDED = "rotatekv:bits=4,group_size=32,heads=1,sinks=0,reorder=false,fold=true"
NAMES = ["llama-mqa-tied", "llama-mha-biases", "qwen3", "qwen3moe-mixed-layers"]


def converted(model: Model) -> Model:
    return Int8.convert(model, NoOptions())


def dequantized(model: Model) -> Model:
    """A plain model with the numbers that the codes stand for."""
    state = model.state_dict()
    scales = {name: state.get(name.removesuffix("weight") + "scale") for name in state}
    plain = Model(model.config)
    plain.load_state_dict(
        {
            name: tensor if (scale := scales[name]) is None else tensor * scale[:, None]
            for name, tensor in state.items()
            if not name.endswith("scale")
        }
    )
    return plain.eval()


@pytest.fixture(scope="module")
def small() -> Model:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=160)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    return random_model(shape("125m", **sizes, **heads), seed=3)


# --- codes


def test_codes_by_hand() -> None:
    rows = torch.tensor([[127.0, -127.0, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.27, 0.01, -0.02]])
    codes, scale = quantize(rows)
    assert codes.tolist() == [[127, -127, 0, 2], [0, 0, 0, 0], [-127, 64, 0, -1]]  # ties to even
    assert scale.tolist() == pytest.approx([1.0, 0.0, 0.02])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_are_those_of_torch(dtype: torch.dtype) -> None:
    weight = (torch.randn(37, 300) * torch.logspace(-3, 1, 37)[:, None]).to(dtype)
    codes, scale = quantize(weight)
    zeros = torch.zeros(37, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight.float(), scale, zeros, 0, -127, 127)
    apart = ((theirs / scale[:, None]).round() - codes).abs()
    # torch multiplies by 1 / scale, which tips some of the ties that numbers of few digits bring.
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.002
    assert ((codes * scale[:, None] - weight.float()).abs() <= scale[:, None] * 0.5001).all()
    assert codes.abs().amax(1).tolist() == [127] * 37


def test_blocks_of_rows_and_tiny_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 16)
    weight[3], weight[4] = 1e-42 * torch.randn(16), 3e38 * torch.rand(16)
    codes, scale = quantize(weight)
    assert scale.isfinite().all() and int(codes.abs().max()) == 127
    monkeypatch.setattr(int8, "_BLOCK", 100)
    again = quantize(weight)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scale)


# --- models


@pytest.mark.parametrize("name", NAMES)
def test_a_model_computes_with_the_numbers_its_codes_stand_for(name: str, tmp_path: Path) -> None:
    model = trimtab.load(make(CASES[name], tmp_path / "model"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    coded = converted(model)
    ids = texts(model, 2, 20)
    with torch.no_grad():
        torch.testing.assert_close(coded(ids), dequantized(coded)(ids), atol=2e-4, rtol=1e-4)
        assert 0 < float((coded(ids) - model(ids)).abs().mean()) < 0.1 * float(model(ids).std())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    plain = {key for key, tensor in coded.state_dict().items() if tensor.dtype != torch.int8}
    assert not [key for key in plain if "proj.weight" in key or "embed_tokens.weight" in key]
    assert coded.weight_bytes() == costs.weight_bytes(model.config, 4, int8=True)
    assert model.weight_bytes() == costs.weight_bytes(model.config, 4)
    assert coded.fingerprint() == model.fingerprint()
    assert coded.dtype == model.dtype and converted(coded) is coded


def test_what_cannot_be_done_is_said(small: Model, tmp_path: Path) -> None:
    coded = converted(small)
    with pytest.raises(ConfigError, match="weights are int8, which a checkpoint cannot hold"):
        save(coded, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"folded into plain weights.*weights=int8 in the plan"):
        fold_rotation(coded, 16, 16)
    broken = random_model(small.config)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[5, 7] = math.nan
    with pytest.raises(ConfigError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight'.*NaN or infinity"):
        converted(broken)
    adapted = random_model(small.config)
    lora.add_lora(adapted, rank=2)
    with pytest.raises(ConfigError, match="adapters are not folded"):
        converted(adapted)


def test_plans() -> None:
    plan = Plan.parse("full weights=int8")
    assert plan == Plan(weights="int8") == Plan.from_dict(plan.to_dict()) == Plan.parse(str(plan))
    assert (plan.label, str(plan)) == ("full weights=int8", "weights=int8")
    with pytest.raises(ConfigError, match=r"unknown weights method 'int9'.*Did you mean 'int8'"):
        Plan(weights="int9")
    with pytest.raises(ConfigError, match="It has no options"):
        Plan(weights="int8:bits=4")


# --- engines


def results(model: Model, prompts: list[list[int]], **options: Any) -> list[tuple[list[int], list[float]]]:
    engine = trimtab.Engine(model, weights="int8", kv_memory="16MiB", **({"threads": 1} | options))
    params = trimtab.SamplingParams(max_tokens=12, temperature=0.8, seed=1, ignore_eos=True, logprobs=0)
    outs = [engine.generate([p], params)[0] for p in prompts]
    together = engine.generate(prompts, params)
    assert [o.token_ids for o in outs] == [o.token_ids for o in together]
    return [(o.token_ids, [x.logprob for x in o.logprobs or ()]) for o in together]


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, 160, (n,), generator=g).tolist() for n in (3, 30, 71)]


def scores(model: Model, pairs: list[tuple[list[int], list[int]]], **options: Any) -> list[list[float]]:
    engine = trimtab.Engine(model, threads=1, kv_memory="16MiB", **options)
    return [s.logprobs for s in engine.score(pairs)]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_neighbours_chunks_and_threads_change_no_bit(small: Model, dtype: str) -> None:
    native_kernels(getattr(torch, dtype), int8=True)
    model = random_model(small.config, dtype, seed=3)
    alone = [results(model, [p], backend="native")[0] for p in prompts()]
    for options in ({}, {"max_step_tokens": 19}, {"threads": 3}, {"cache": "full:hydragen=false"}):
        assert results(model, prompts(), backend="native", **options) == alone


@pytest.mark.parametrize("cache", ["full", "kivi:group_size=16,residual=32,bits=4", FOLDED])
def test_kernels_and_torch_agree(small: Model, cache: str) -> None:
    """The step in one call, layer by layer, and on weights that were rotated before they were coded."""
    native_kernels(int8=True)
    pairs = [(p, list(range(5, 20))) for p in prompts()]
    native = scores(small, pairs, weights="int8", cache=cache, backend="native")
    other = scores(small, pairs, weights="int8", cache=cache, backend="torch")
    difference = (torch.tensor(native) - torch.tensor(other)).abs()
    assert difference.mean() < 2e-3 and difference.quantile(0.75) < 5e-4
    if cache == "full":
        plain = scores(dequantized(converted(small)), pairs, backend="torch")
        assert (torch.tensor(plain) - torch.tensor(native)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_torch(small: Model, dtype: str) -> None:
    """Sums of codes up to 127 must not overflow float16."""
    model = random_model(small.config, dtype, seed=3)
    pairs = [(p, list(range(5, 20))) for p in prompts()]
    wide = torch.tensor(scores(small, pairs, weights="int8", backend="torch"))
    assert (torch.tensor(scores(model, pairs, weights="int8", backend="torch")) - wide).abs().mean() < 0.05
    with torch.no_grad():
        hidden = torch.full((1, 64), 60.0).to(model.dtype)
        assert converted(model).logits(hidden).isfinite().all()


def test_the_engine_lets_go_of_the_plain_weights(small: Model) -> None:
    engine = trimtab.Engine(small, weights="int8", backend="torch", threads=1)
    assert engine.model is engine.runner.model and engine.model.weights == "int8"
    assert engine.model.weight_bytes() < small.weight_bytes() / 3
    rotated = trimtab.Engine(small, weights="int8", cache=FOLDED, backend="torch", threads=1)
    assert rotated.model is small and rotated.runner.model.weights == "int8"


def perplexity(model: Model, ids: list[int], **options: Any) -> float:
    pairs = [(ids[i : i + 1], ids[i + 1 : i + 512]) for i in range(0, len(ids) - 512, 512)]
    logprobs = torch.tensor(scores(model, pairs, **options))
    return float((-logprobs.mean()).exp())


@pytest.mark.slow
def test_perplexity_of_the_shipped_model_hardly_moves() -> None:
    native_kernels(int8=True)
    model = trimtab.load(dtype="float32")
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(shipped_text()[:24_000])
    plain, coded = (perplexity(model, ids, weights=w, backend="native") for w in ("plain", "int8"))
    assert coded != plain
    assert abs(coded / plain - 1) < 0.005
