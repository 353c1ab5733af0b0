"""What a model says about itself: costs, fingerprint, shapes; and what it refuses to be fed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import trimtab
from models.tiny_models import CASES, make
from trimtab.errors import ConfigError, RequestError
from trimtab.models import costs
from trimtab.models.config import config_from_dict
from trimtab.models.shapes import random_model, shape
from trimtab.models.transformer import Model


@pytest.mark.parametrize("name", sorted(CASES))
def test_counts(name: str, tmp_path: Path) -> None:
    model = trimtab.load(make(CASES[name], tmp_path))
    config = model.config
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.weight_bytes() == sum(p.nbytes for p in model.parameters())
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    assert model.matmul_parameters() == matrices + tied
    assert model.kv_bytes_per_token() == 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert model.kv_bytes_per_token(torch.bfloat16) * 2 == model.kv_bytes_per_token()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen3moe-mixed-layers"])
def test_operations_are_those_that_run(name: str, tmp_path: Path) -> None:
    """Counted by torch while it computes; attention is given as one matrix product pair a token."""
    model = trimtab.load(make(CASES[name], tmp_path))
    config, context = model.config, 23

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        past = torch.zeros(config.num_heads, context, config.head_dim)
        scores = q.transpose(0, 1) @ past.transpose(1, 2)
        return (scores @ past).transpose(0, 1)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.logits(model.run(torch.tensor([5]), torch.tensor([context - 1]), attend))
    assert counter.get_total_flops() == model.decode_flops(context)


def test_a_prompt_costs_as_much_as_its_tokens_one_by_one() -> None:
    for changes in (
        {},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
    ):
        config = shape("125m", **changes)
        head = 2 * config.vocab_size * config.hidden_size
        one_by_one = sum(costs.decode_flops(config, n) for n in range(1, 13)) - 11 * head
        assert costs.prefill_flops(config, 12) == one_by_one


def test_active_parameters_of_a_sparse_model(tmp_path: Path) -> None:
    model = trimtab.load(make(CASES["mixtral"], tmp_path))
    expert = 3 * model.config.hidden_size * model.config.intermediate_size
    idle = 3 * (5 - 2) * expert
    assert model.matmul_parameters(active_only=True) == model.matmul_parameters() - idle


def test_only_visited_experts_are_computed(tmp_path: Path) -> None:
    model = trimtab.load(make(CASES["mixtral"], tmp_path))
    block = model.model.layers[0].feed_forward
    rows: dict[int, int] = {}
    for index, expert in enumerate(block.experts):
        expert.register_forward_pre_hook(lambda _, args, i=index: rows.__setitem__(i, len(args[0])))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    chosen, _ = block.route(x)
    block(x)
    assert rows == {i: int((chosen == i).sum()) for i in chosen.unique().tolist()}
    assert sum(rows.values()) == 6 and len(rows) < 6


def test_fingerprint() -> None:
    config = shape("125m", **_TINY)
    model, same, other = (random_model(config, seed=seed) for seed in (0, 0, 1))
    first = model.fingerprint()
    assert len(first) == 64 and int(first, 16)
    assert first == same.fingerprint() != other.fingerprint()
    narrower = shape("125m", **_TINY | {"rms_norm_eps": 1e-6})
    assert first != random_model(narrower, seed=0).fingerprint(), "the config counts"
    renamed = shape("125m", **_TINY | {"eos_token_id": 3})
    assert first == random_model(renamed, seed=0).fingerprint(), "the end token does not"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    changed = model.fingerprint()
    assert changed != first, "a written parameter is seen although the result is kept"
    model.model.norm.weight = torch.nn.Parameter(torch.full((32,), 2.0))
    assert model.fingerprint() != changed, "and so is a replaced one"


def test_fingerprint_does_not_depend_on_how_it_was_loaded() -> None:
    assert trimtab.load().fingerprint() == trimtab.load(dtype="float32").fingerprint()


@pytest.mark.parametrize(("name", "millions"), [("125m", 124), ("500m", 493), ("1b", 1236), ("8b", 8030)])
def test_shapes(name: str, millions: int) -> None:
    assert costs.num_parameters(shape(name)) // 10**6 == pytest.approx(millions, abs=1)


def test_unknown_shape() -> None:
    with pytest.raises(ConfigError, match=r"unknown model shape '125M'\. Did you mean '125m'"):
        shape("125M")


@torch.no_grad()
def test_random_model() -> None:
    config = shape("125m", **_TINY)
    model = random_model(config, "bfloat16", seed=3)
    assert model.dtype == torch.bfloat16 and model.tokenizer is None and model.path is None
    again = random_model(config, "bfloat16", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    for i, matrix in enumerate(matrices):
        assert matrix.float().var() == pytest.approx(1 / matrix.shape[1], rel=0.1)
        assert all(not torch.equal(matrix, other) for other in matrices[:i] if other.shape == matrix.shape)
    logits = model(torch.arange(60)[None]).float()
    assert logits.shape == (1, 60, 128)
    assert 0.3 < logits.std() < 3, "activations neither vanish nor explode"


@torch.no_grad()
def test_random_model_of_every_family() -> None:
    raw = dict(shape("125m", **_TINY).raw)
    for family, changes in {
        "Qwen2": {"model_type": "qwen2"},
        "Qwen3": {"model_type": "qwen3", "head_dim": 8},
        "Mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    }.items():
        config = config_from_dict(raw | changes | {"architectures": [f"{family}ForCausalLM"]})
        assert random_model(config)(torch.arange(10)[None]).isfinite().all()


def test_bad_input() -> None:
    model = random_model(shape("125m", **_TINY))
    with pytest.raises(RequestError, match=r"input_ids has shape \(5,\)"):
        model(torch.arange(5))
    with pytest.raises(RequestError, match=r"torch.float32; it must be integers"):
        model(torch.ones(1, 5))
    with pytest.raises(RequestError, match=r"attention_mask has shape \(1, 4\)"):
        model(torch.ones(1, 5, dtype=torch.long), torch.ones(1, 4))


def test_moving_and_casting() -> None:
    model: Model = random_model(shape("125m", **_TINY))
    inv_freq = model.rotary.inv_freq.clone()
    assert model.bfloat16().dtype == torch.bfloat16
    assert torch.equal(model.rotary.inv_freq, inv_freq), "a cast of the weights leaves the frequencies alone"


_TINY = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)
