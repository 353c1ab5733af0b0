"""The `config.json` of well-known models of each family is understood, key by key."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from trimtab.models import costs
from trimtab.models.config import config_from_dict

LLAMA_3_2_1B = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009], head_dim=64, hidden_act="silu", hidden_size=2048,
    initializer_range=0.02, intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False,
    model_type="llama", num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8,
    pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling=dict(
        factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16",
    transformers_version="4.45.0.dev0", use_cache=True, vocab_size=128256,
)  # fmt: skip
LLAMA_2_7B = dict(
    _name_or_path="meta-llama/Llama-2-7b-hf", architectures=["LlamaForCausalLM"], bos_token_id=1,
    eos_token_id=2, hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=11008,
    max_position_embeddings=4096, model_type="llama", num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None,
    tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0.dev0", use_cache=True,
    vocab_size=32000,
)  # fmt: skip
MISTRAL_7B = dict(
    architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu",
    hidden_size=4096, initializer_range=0.02, intermediate_size=14336, max_position_embeddings=32768,
    model_type="mistral", num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
    rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
    torch_dtype="bfloat16", transformers_version="4.34.0.dev0", use_cache=True, vocab_size=32000,
)  # fmt: skip
QWEN2_5_HALF_B = dict(
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
    hidden_act="silu", hidden_size=896, initializer_range=0.02, intermediate_size=4864,
    max_position_embeddings=32768, max_window_layers=21, model_type="qwen2", num_attention_heads=14,
    num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0,
    sliding_window=32768, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.43.1",
    use_cache=True, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
QWEN3_0_6B = dict(
    architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
    eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=1024, initializer_range=0.02,
    intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, model_type="qwen3",
    num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06,
    rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
    torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True, use_sliding_window=False,
    vocab_size=151936,
)  # fmt: skip
MIXTRAL_8X7B = dict(
    architectures=["MixtralForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
    hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
    max_position_embeddings=32768, model_type="mixtral", num_attention_heads=32, num_experts_per_tok=2,
    num_hidden_layers=32, num_key_value_heads=8, num_local_experts=8, output_router_logits=False,
    rms_norm_eps=1e-05, rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.36.0.dev0", use_cache=True,
    vocab_size=32000,
)  # fmt: skip
QWEN3_30B_A3B = dict(
    architectures=["Qwen3MoeForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=151643, decoder_sparse_step=1, eos_token_id=151645, head_dim=128, hidden_act="silu",
    hidden_size=2048, initializer_range=0.02, intermediate_size=6144, max_position_embeddings=40960,
    max_window_layers=48, mlp_only_layers=[], model_type="qwen3_moe", moe_intermediate_size=768,
    norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
    num_hidden_layers=48, num_key_value_heads=4, output_router_logits=False, rms_norm_eps=1e-06,
    rope_scaling=None, rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True,
    use_sliding_window=False, vocab_size=151936,
)  # fmt: skip

# Published parameter counts, in millions.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "Llama-3.2-1B": (LLAMA_3_2_1B, 1235.8),
    "Llama-2-7B": (LLAMA_2_7B, 6738.4),
    "Mistral-7B": (MISTRAL_7B, 7241.7),
    "Qwen2.5-0.5B": (QWEN2_5_HALF_B, 494.0),
    "Qwen3-0.6B": (QWEN3_0_6B, 596.0),
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46702.8),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30532.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_read_and_counted(name: str) -> None:
    raw, millions = PUBLISHED[name]
    assert costs.num_parameters(config_from_dict(raw)) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rewritten_by_transformers_it_means_the_same(name: str) -> None:
    """The newest writer moves rope settings and renames keys; what is read is equal."""
    raw, _ = PUBLISHED[name]
    rewritten = transformers.AutoConfig.for_model(**raw).to_dict()
    rewritten["architectures"] = raw["architectures"]
    assert config_from_dict(rewritten) == config_from_dict(raw)


def test_active_parameters_give_the_models_their_names() -> None:
    active = costs.matmul_parameters(config_from_dict(QWEN3_30B_A3B), active_only=True)
    assert active / 1e9 == pytest.approx(3.0, abs=0.3)
