"""`config.json` is read to the last key: used, harmless, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import CheckpointError
from trimtab.models.config import config_from_dict, config_from_folder
from trimtab.models.families import FAMILIES

LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    hidden_act="silu",
)


def of(family: str, **changes: Any) -> dict[str, Any]:
    model_type = FAMILIES[f"{family}ForCausalLM"].model_type
    return LLAMA | {"architectures": [f"{family}ForCausalLM"], "model_type": model_type} | changes


def without(key: str, raw: dict[str, Any] = LLAMA) -> dict[str, Any]:
    return {k: v for k, v in raw.items() if k != key}


MOE = of("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no-vocab": (without("vocab_size"), "no field 'vocab_size'"),
    "no-eps": (without("rms_norm_eps"), "no field 'rms_norm_eps'"),
    "no-context": (without("max_position_embeddings"), "no field 'max_position_embeddings'"),
    "null-layers": (LLAMA | {"num_hidden_layers": None}, "no field 'num_hidden_layers'"),
    "no-kv-heads": (without("num_key_value_heads", of("Mistral")), "no field 'num_key_value_heads'"),
    "no-experts": (of("Mixtral", num_experts_per_tok=2), "no field 'num_local_experts'"),
    "text-number": (LLAMA | {"hidden_size": "32"}, "'hidden_size' to '32'; it must be a whole number"),
    "negative": (LLAMA | {"num_attention_heads": -4}, "'num_attention_heads' to -4"),
    "boolean": (LLAMA | {"vocab_size": True}, "'vocab_size' to True"),
    "nan": (LLAMA | {"rms_norm_eps": float("nan")}, "'rms_norm_eps' to nan"),
    "not-a-flag": (LLAMA | {"tie_word_embeddings": "no"}, "'tie_word_embeddings' to 'no'"),
    "uneven-heads": (LLAMA | {"num_key_value_heads": 3}, "a divisor of 'num_attention_heads' (4)"),
    "uneven-hidden": (LLAMA | {"hidden_size": 30}, "does not divide"),
    "odd-head": (LLAMA | {"head_dim": 7}, "'head_dim' to 7; it must be even"),
    "architecture": (LLAMA | {"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'"),
    "near-name": (LLAMA | {"architectures": ["LlamaForCausalML"]}, "Did you mean 'LlamaForCausalLM'"),
    "two-names": (LLAMA | {"architectures": ["A", "B"]}, "a list of one name"),
    "model-type": (LLAMA | {"model_type": "gpt2"}, "they must agree"),
    "nameless": (without("architectures") | {"model_type": "gpt2"}, "'model_type' 'gpt2' is unknown"),
    "activation": (LLAMA | {"hidden_act": "gelu"}, "'hidden_act' to 'gelu'"),
    "unknown-key": (LLAMA | {"logit_scale": 0.5}, "'logit_scale' to 0.5, a key that trimtab does not know"),
    "quantized": (LLAMA | {"quantization_config": {"bits": 4}}, "'quantization_config'"),
    "own-code": (LLAMA | {"auto_map": {"AutoModel": "x.y"}}, "'auto_map'"),
    "partial-rotary": (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' to 0.5"),
    "partial-rotary-inside": (
        LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "'partial_rotary_factor' to 0.5",
    ),
    "llama-window": (LLAMA | {"sliding_window": 16}, "'sliding_window' to 16"),
    "mistral-bias": (of("Mistral", attention_bias=True), "'attention_bias' to True"),
    "qwen2-bias": (of("Qwen2", attention_bias=True), "'attention_bias' to True"),
    "mlp-bias": (of("Qwen3", mlp_bias=True), "'mlp_bias' to True"),
    "mistral-layers": (of("Mistral", layer_types=["full_attention"] * 2), "'layer_types'"),
    "few-layers": (of("Qwen2", layer_types=["full_attention"]), "a list of 2 names"),
    "odd-layer": (of("Qwen2", layer_types=["full_attention", "chunked"]), "'layer_types' to 'chunked'"),
    "no-window": (of("Qwen2", layer_types=["sliding_attention"] * 2), "but no window"),
    "bad-window": (of("Mistral", sliding_window=0), "'sliding_window' to 0"),
    "many-experts": (MOE | {"num_experts_per_tok": 9}, "at most the number of experts (4)"),
    "two-counts": (MOE | {"num_local_experts": 8}, "num_experts and num_local_experts"),
    "bad-dense-layers": (MOE | {"mlp_only_layers": "0"}, "'mlp_only_layers' to '0'"),
    "rope-kind": (LLAMA | {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "the type 'longrope'"),
    "rope-two-kinds": (
        LLAMA | {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
        "two types",
    ),
    "rope-per-layer": (
        of("Qwen3", rope_parameters={"full_attention": {"rope_type": "default"}}),
        "differ by layer type",
    ),
    "rope-no-factor": (LLAMA | {"rope_scaling": {"type": "linear"}}, "no field 'factor'"),
    "rope-bad-factor": (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' to 0"),
    "rope-unused": (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, "'beta_fast'"),
    "rope-default-factor": (LLAMA | {"rope_scaling": {"type": "default", "factor": 2.0}}, "'factor'"),
    "rope-unknown": (LLAMA | {"rope_scaling": {"type": "default", "extra": 1}}, "'extra'"),
    "rope-both": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}},
        "both 'rope_scaling' and 'rope_parameters'",
    ),
    "rope-not-object": (LLAMA | {"rope_scaling": 2.0}, "'rope_scaling' to 2.0"),
    "rope-theta": (LLAMA | {"rope_theta": -1}, "'rope_theta' to -1"),
    "llama3-no-low": (LLAMA | {"rope_scaling": without("low_freq_factor", LLAMA3)}, "'low_freq_factor'"),
    "llama3-order": (LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "above 'low_freq_factor'"),
    "outer-original": (
        LLAMA | {"original_max_position_embeddings": 32},
        "'original_max_position_embeddings'",
    ),
    "eos": (LLAMA | {"eos_token_id": "</s>"}, "'eos_token_id' to '</s>'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    raw, expected = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        config_from_dict(raw, where="some/config.json")
    message = str(caught.value)
    assert expected in message
    assert "some/config.json" in message and "\n" not in message


def test_the_plain_config_is_accepted() -> None:
    config = config_from_dict(LLAMA)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert config.sliding_windows == (None, None) and config.moe is None
    assert config.rope.kind == "default" and config.rope.theta == 10_000.0
    assert not config.tie_word_embeddings and not config.qkv_bias and not config.qk_norm
    assert config_from_dict(dict(LLAMA)) == config and hash(config) == hash(config_from_dict(LLAMA))


def test_both_styles_of_rope_are_one() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 16}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **scaling}}
    new = LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", **scaling}}
    assert config_from_dict(old) == config_from_dict(new)
    assert config_from_dict(old).rope.original_max_positions == 16


def test_old_and_new_default_rope_are_one() -> None:
    new = LLAMA | {"rope_parameters": {"rope_theta": 2e6, "rope_type": "default"}}
    assert config_from_dict(LLAMA | {"rope_theta": 2e6, "rope_scaling": None}) == config_from_dict(new)


def test_original_context_defaults_to_the_context_and_a_top_level_one_wins() -> None:
    assert config_from_dict(LLAMA | {"rope_scaling": LLAMA3}).rope.original_max_positions == 64
    inside = LLAMA3 | {"original_max_position_embeddings": 32}
    both = LLAMA | {"rope_scaling": inside, "original_max_position_embeddings": 16}
    assert config_from_dict(both).rope.original_max_positions == 16


def test_head_counts_left_out() -> None:
    assert config_from_dict(without("num_key_value_heads")).num_kv_heads == 4
    assert config_from_dict(of("Mistral", num_key_value_heads=None)).num_kv_heads == 4
    assert config_from_dict(of("Qwen3")).head_dim == 128, "the family's default"
    assert config_from_dict(of("Qwen3", head_dim=None)).head_dim == 8


def test_windows_of_each_family() -> None:
    def windows(raw: dict[str, Any]) -> tuple[int | None, ...]:
        return config_from_dict(raw).sliding_windows

    assert windows(of("Mistral")) == (4096, 4096), "the family's default where the key is absent"
    assert windows(of("Mistral", sliding_window=None)) == (None, None)
    assert windows(of("Mixtral", num_local_experts=4, num_experts_per_tok=2)) == (None, None)
    assert windows(of("Qwen2", sliding_window=8)) == (None, None), "switched off"
    assert windows(of("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)) == (None, 8)
    kinds = ["sliding_attention", "full_attention"]
    assert windows(of("Qwen3", use_sliding_window=True, sliding_window=8, layer_types=kinds)) == (8, None)
    assert windows(MOE | dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)) == (8, 8)


def test_expert_layers() -> None:
    def sparse(**changes: Any) -> tuple[bool, ...]:
        moe = config_from_dict(MOE | {"num_hidden_layers": 4} | changes).moe
        assert moe is not None
        return moe.sparse_layers

    assert sparse() == (True, True, True, True)
    assert sparse(decoder_sparse_step=2) == (False, True, False, True)
    assert sparse(mlp_only_layers=[0, 3]) == (False, True, True, False)


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 2, "bos_token_id": 1}))
    assert config_from_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    config = config_from_folder(tmp_path)
    assert set(config.eos_token_ids) == {2, 5} and config.bos_token_id == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "has no config.json"), ("{", "cannot be read as JSON"), ("[]", "must hold a JSON object")],
)
def test_broken_file(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=expected):
        config_from_folder(tmp_path)
