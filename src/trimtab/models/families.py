"""The model families as a table: an architecture name and the switches that make it what it is.

A further family is a row here. What a row cannot express is not supported, and `config.json` files that
ask for it are refused by name. Defaults are those of the family's reference implementation and apply
only where a checkpoint leaves the key out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import CheckpointError
from trimtab.models.fields import Fields

Windows = tuple[int | None, ...]
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a mixture-of-experts family names its parts, and which config keys size them."""

    block: str  # the module that takes the place of `mlp`
    gate: str
    up: str
    down: str
    count_keys: tuple[str, ...]
    width_key: str
    sparse_step_key: str | None
    dense_layers_key: str | None
    normalise_key: str | None  # None: the chosen experts' weights always sum to one


@dataclass(frozen=True, slots=True)
class Family:
    """One row: what distinguishes an architecture. A bias of None is read from `attention_bias`."""

    model_type: str
    windows: Callable[[Fields, int], Windows]
    qkv_bias: bool | None = False
    o_bias: bool | None = False
    mlp_bias_key: str | None = None
    qk_norm: bool = False
    experts: ExpertNames | None = None
    default_theta: float = 10_000.0
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _no_window(fields: Fields, num_layers: int) -> Windows:
    fields.demand("sliding_window", (None,), None)
    return (None,) * num_layers


def _one_window(fields: Fields, num_layers: int) -> Windows:
    return (fields.integer("sliding_window", None),) * num_layers


def _switched_window(fields: Fields, num_layers: int) -> Windows:
    used = fields.flag("use_sliding_window", False)
    # This family's reference model knows no per-layer choice, whatever its files carry along.
    fields.value("max_window_layers", None)
    window = fields.integer("sliding_window", None)
    return (window if used else None,) * num_layers


def _layered_window(fields: Fields, num_layers: int) -> Windows:
    used = fields.flag("use_sliding_window", False)
    first_windowed = fields.integer("max_window_layers", 0, minimum=0)
    window = fields.integer("sliding_window", None)
    window = window if used else None
    kinds = fields.value("layer_types", None)
    if kinds is None:
        return tuple(window if layer >= first_windowed else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", kinds, f"a list of {num_layers} names, one for each layer")
    unknown = [kind for kind in kinds if kind not in LAYER_TYPES]
    if unknown:
        raise fields.error("layer_types", unknown[0], " or ".join(LAYER_TYPES) + " in every layer")
    if "sliding_attention" in kinds and window is None:
        raise CheckpointError(
            f"{fields.where} has sliding_attention in 'layer_types' but no window: set 'use_sliding_window' "
            "to true and 'sliding_window' to a number of tokens"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


_MIXTRAL_EXPERTS = ExpertNames(
    block="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    count_keys=("num_local_experts",),
    width_key="intermediate_size",
    sparse_step_key=None,
    dense_layers_key=None,
    normalise_key=None,
)
_QWEN3_EXPERTS = ExpertNames(
    block="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    count_keys=("num_experts", "num_local_experts"),
    width_key="moe_intermediate_size",
    sparse_step_key="decoder_sparse_step",
    dense_layers_key="mlp_only_layers",
    normalise_key="norm_topk_prob",
)
_QWEN_WINDOW = {"sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _no_window, qkv_bias=None, o_bias=None, mlp_bias_key="mlp_bias"),
    "MistralForCausalLM": Family("mistral", _one_window, defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family("qwen2", _layered_window, qkv_bias=True, defaults=_QWEN_WINDOW),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        _layered_window,
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
        defaults={**_QWEN_WINDOW, "head_dim": 128},
    ),
    "MixtralForCausalLM": Family("mixtral", _one_window, experts=_MIXTRAL_EXPERTS, default_theta=1_000_000.0),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        _switched_window,
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
        experts=_QWEN3_EXPERTS,
        defaults={"sliding_window": 4096},
    ),
}

# Keys that cannot change the numbers of a forward pass at inference: bookkeeping, training-only settings
# (dropout, initialisation, router losses and jitter) and generation settings of old files. Each is listed
# by name; names with a leading underscore are the writer's private notes.
IRRELEVANT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_max_length",
        "model_type",
        "neftune_noise_alpha",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)

# Features of other models that appear, switched off, in the files of these families.
SWITCHED_OFF: dict[str, tuple[tuple[Any, ...], Any]] = {
    "hidden_act": (("silu", "swish"), "silu"),
    "attention_bias": ((False,), False),
    "mlp_bias": ((False,), False),
    "partial_rotary_factor": ((1, None), None),
    "rope_interleaved": ((False,), False),
    "is_encoder_decoder": ((False,), False),
    "is_decoder": ((False, True), False),
    "add_cross_attention": ((False,), False),
    "cross_attention_hidden_size": ((None,), None),
    "tie_encoder_decoder": ((False,), False),
    "tf_legacy_loss": ((False,), False),
    "pruned_heads": (({}, None), None),
    "sliding_window": ((None,), None),
    "use_sliding_window": ((False,), False),
    "auto_map": ((None,), None),
    "quantization_config": ((None,), None),
}
