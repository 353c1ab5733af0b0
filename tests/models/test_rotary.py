"""Frequencies are those of `transformers`; angles stay exact far beyond where float32 products do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trimtab.models.config import config_from_dict
from trimtab.models.rotary import Rotary, rotate

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-all": {
        "factor": 16.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 20,
        "beta_slow": 3,
        "mscale": 0.9,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
    "yarn-no-factor": {"factor": None, "original_max_position_embeddings": 256},
    "yarn-attention-factor": {"factor": 2.0, "attention_factor": 0.8},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
KINDS = [(name, theta, dim) for name in SETTINGS for theta in (10_000.0, 500_000.0) for dim in (16, 64, 128)]


def rope_of(name: str, theta: float, dim: int, **more: Any) -> tuple[Rotary, dict[str, Any]]:
    settings = {"rope_type": name.split("-")[0], "rope_theta": theta, **SETTINGS[name]}
    raw = dict(
        architectures=["LlamaForCausalLM"],
        hidden_size=4 * dim,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=1024,
        **more,
    )
    config = config_from_dict(raw | {"rope_parameters": settings})
    return Rotary(config.rope, config.head_dim), raw | {"rope_parameters": dict(settings)}


def reference(raw: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(**{k: v for k, v in raw.items() if k != "architectures"})


@pytest.mark.parametrize(("name", "theta", "dim"), KINDS)
def test_frequencies_are_bit_equal(name: str, theta: float, dim: int) -> None:
    rotary, raw = rope_of(name, theta, dim)
    theirs = LlamaRotaryEmbedding(reference(raw))
    assert torch.equal(rotary.inv_freq, theirs.inv_freq)
    assert rotary.scale == theirs.attention_scaling


@pytest.mark.parametrize("length", [1, 1024, 1025, 1500, 8192])
def test_dynamic_frequencies_follow_the_length(length: int) -> None:
    rotary, raw = rope_of("dynamic", 10_000.0, 64)
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](reference(raw), seq_len=torch.tensor(length))
    cos, sin = rotary.cos_sin(torch.tensor([1, 100]), length)
    for row, position in enumerate((1, 100)):
        torch.testing.assert_close(cos[row], (position * theirs).cos(), rtol=0, atol=2e-5)
        torch.testing.assert_close(sin[row], (position * theirs).sin(), rtol=0, atol=2e-5)


def test_dynamic_takes_a_length_for_each_row_and_else_the_last_position() -> None:
    rotary, _ = rope_of("dynamic", 10_000.0, 64)
    positions = torch.tensor([5, 1999, 3])
    lengths = torch.tensor([10, 2000, 5000])
    together = torch.stack(rotary.cos_sin(positions, lengths))
    for row in range(3):
        alone = torch.stack(rotary.cos_sin(positions[row : row + 1], int(lengths[row])))
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=0, atol=1e-6)
    last = torch.stack(rotary.cos_sin(positions))
    torch.testing.assert_close(last, torch.stack(rotary.cos_sin(positions, 2000)), rtol=0, atol=0)
    assert not torch.allclose(last, torch.stack(rotary.cos_sin(positions, 1024)), atol=1e-3)


@pytest.mark.parametrize("position", [0, 1, 4_095, 131_071, 1_000_003, 16_777_217])
def test_angles_are_exact_at_any_position(position: int) -> None:
    rotary, _ = rope_of("default", 10_000.0, 64)
    cos, sin = rotary.cos_sin(torch.tensor([position]))
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (1, 32)
    for pair, frequency in enumerate(rotary.inv_freq.tolist()):
        assert cos[0, pair] == pytest.approx(math.cos(position * frequency), abs=1e-6)
        assert sin[0, pair] == pytest.approx(math.sin(position * frequency), abs=1e-6)


def test_scores_depend_on_distance_only_even_at_a_million() -> None:
    rotary, _ = rope_of("default", 10_000.0, 64)
    q, k = torch.randn(2, 1, 3, 64, generator=torch.Generator().manual_seed(0))

    def score(at: int) -> torch.Tensor:
        rotated = [rotate(x, *rotary.cos_sin(torch.tensor([p]))) for x, p in ((q, at + 17), (k, at))]
        return (rotated[0] * rotated[1]).sum(-1)

    torch.testing.assert_close(score(1_000_000), score(0), rtol=0, atol=1e-4)


def test_rotation_turns_pairs_of_the_two_halves() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert rotate(x, cos, sin).tolist() == [[[-3.0, 2.0, 1.0, 4.0]]]
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16
