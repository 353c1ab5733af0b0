"""What a model is, read strictly from a Hugging Face `config.json`.

Every key of the file is used, or listed as harmless in `families.py`, or refused by name: a setting that
changes the numbers and is passed over would give a model that is quietly wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import CheckpointError, did_you_mean
from trimtab.models.families import FAMILIES, IRRELEVANT, SWITCHED_OFF, Family
from trimtab.models.fields import Fields
from trimtab.models.rope_config import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """The sparse feed-forward part: each token goes through `experts_per_token` of `num_experts` experts.

    `intermediate_size` is one expert's width. `normalise` rescales the chosen experts' weights to sum to
    one. `sparse_layers` says for each layer whether it has experts or a dense MLP. The names are those of
    the checkpoint's modules.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalise: bool
    sparse_layers: tuple[bool, ...]
    block_name: str
    gate_name: str
    up_name: str
    down_name: str


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only Transformer, complete: two equal configs compute the same function of the weights.

    Attributes:
        vocab_size, hidden_size, intermediate_size: widths, in elements.
        num_layers, num_heads, num_kv_heads, head_dim: `num_heads` query heads share `num_kv_heads` keys.
        rms_norm_eps: added to the mean square in every norm.
        max_position_embeddings: the context length in tokens that the model was made for.
        rope: the rotary embedding, scaling included.
        tie_word_embeddings: the output head is the embedding table.
        qkv_bias, o_bias, mlp_bias, qk_norm: switches of the family.
        sliding_windows: for each layer the number of latest tokens it sees, itself included; None = all.
        moe: None for dense models.
        bos_token_id, eos_token_ids: which token starts a text, which ones end it.
        architecture: the checkpoint's name for the family, e.g. `LlamaForCausalLM`.
        raw: `config.json` as found; what `save` writes back.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    moe: MoEConfig | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    architecture: str
    raw: Mapping[str, Any] = field(compare=False, repr=False)

    @property
    def context_length(self) -> int:
        """Tokens one text may have. Linear and dynamic rope scaling stretch `max_position_embeddings`, the
        length before scaling; the other kinds' configs give the length after it."""
        stretched = self.rope.kind in ("linear", "dynamic")
        return (
            int(self.max_position_embeddings * self.rope.factor)
            if stretched
            else self.max_position_embeddings
        )

    def is_sparse(self, layer: int) -> bool:
        """True where layer `layer` has experts instead of a dense MLP."""
        return self.moe is not None and self.moe.sparse_layers[layer]


def config_from_folder(folder: Path) -> ModelConfig:
    """Read `config.json` of a model folder, and further end tokens from its `generation_config.json`.

    Raises CheckpointError for a missing or malformed file, a missing field, and anything unsupported.
    """
    path = folder / "config.json"
    raw = _read_object(path)
    if raw is None:
        raise CheckpointError(f"{folder} has no config.json; it is not a model folder in Hugging Face format")
    generation = _read_object(folder / "generation_config.json") or {}
    return config_from_dict(raw, where=str(path), more_eos=generation.get("eos_token_id"))


def config_from_dict(raw: Mapping[str, Any], where: str = "the config", more_eos: Any = None) -> ModelConfig:
    """A `ModelConfig` from the contents of a `config.json`; `more_eos` joins its `eos_token_id`."""
    name, family = _family(raw, where)
    fields = Fields(raw, where, family.defaults)
    num_layers = fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", None)
    if head_dim is None:
        if hidden_size % num_heads:
            raise CheckpointError(
                f"{where} has 'hidden_size' {hidden_size}, which 'num_attention_heads' {num_heads} does not "
                "divide, and no 'head_dim'"
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "even, as the rotary embedding turns pairs")
    # The other families' reference defaults are one particular model's head count, not a rule.
    default_kv = {"default": num_heads} if family.model_type == "llama" else {}
    num_kv_heads = _kv_heads(fields, num_heads, **default_kv)
    max_positions = fields.integer("max_position_embeddings")
    attention_bias = None in (family.qkv_bias, family.o_bias) and fields.flag("attention_bias", False)
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_position_embeddings=max_positions,
        rope=read_rope(fields, max_positions, head_dim, family.default_theta),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=fields.flag(family.mlp_bias_key, False) if family.mlp_bias_key else False,
        qk_norm=family.qk_norm,
        sliding_windows=family.windows(fields, num_layers),
        moe=_experts(fields, family, num_layers),
        bos_token_id=_first(_token_ids(raw.get("bos_token_id"), "bos_token_id", where)),
        eos_token_ids=tuple(
            dict.fromkeys(
                _token_ids(raw.get("eos_token_id"), "eos_token_id", where)
                + _token_ids(more_eos, "eos_token_id", where)
            )
        ),
        architecture=name,
        raw=dict(raw),
    )
    _refuse_unknown(fields)
    return config


def _family(raw: Mapping[str, Any], where: str) -> tuple[str, Family]:
    names = raw.get("architectures")
    if not names:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        name = by_type.get(str(raw.get("model_type")))
        if name is None:
            raise CheckpointError(
                f"{where} has no field 'architectures', and its 'model_type' {raw.get('model_type')!r} is "
                f"unknown; supported: {', '.join(FAMILIES)}"
            )
        return name, FAMILIES[name]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{where} sets 'architectures' to {names!r}; it must be a list of one name")
    name = names[0]
    if name not in FAMILIES:
        raise CheckpointError(
            f"{where} asks for the architecture {name!r}, which trimtab does not implement."
            f"{did_you_mean(name, FAMILIES, n=6)}"
        )
    family = FAMILIES[name]
    if raw.get("model_type") not in (None, family.model_type):
        raise CheckpointError(
            f"{where} has architecture {name!r} but 'model_type' {raw['model_type']!r}; they must agree "
            f"({family.model_type!r})"
        )
    return name, family


def _kv_heads(fields: Fields, num_heads: int, **default: int) -> int:
    explicit_null = fields.raw.get("num_key_value_heads", 0) is None
    count = num_heads if explicit_null else fields.integer("num_key_value_heads", **default)
    fields.read.add("num_key_value_heads")
    if num_heads % count:
        raise fields.error("num_key_value_heads", count, f"a divisor of 'num_attention_heads' ({num_heads})")
    return count


def _experts(fields: Fields, family: Family, num_layers: int) -> MoEConfig | None:
    names = family.experts
    if names is None:
        return None
    given = [key for key in names.count_keys if fields.raw.get(key) is not None]
    counts = {fields.integer(key) for key in given or names.count_keys[:1]}
    if len(counts) > 1:
        raise CheckpointError(f"{fields.where} gives different values for {' and '.join(given)}")
    num_experts = counts.pop()
    per_token = fields.integer("num_experts_per_tok")
    if per_token > num_experts:
        raise fields.error("num_experts_per_tok", per_token, f"at most the number of experts ({num_experts})")
    step = fields.integer(names.sparse_step_key, 1) if names.sparse_step_key else 1
    dense = fields.value(names.dense_layers_key, []) if names.dense_layers_key else []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise fields.error(str(names.dense_layers_key), dense, "a list of layer numbers")
    return MoEConfig(
        num_experts=num_experts,
        experts_per_token=per_token,
        intermediate_size=fields.integer(names.width_key),
        normalise=fields.flag(names.normalise_key, False) if names.normalise_key else True,
        sparse_layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
        block_name=names.block,
        gate_name=names.gate,
        up_name=names.up,
        down_name=names.down,
    )


def _refuse_unknown(fields: Fields) -> None:
    for key in fields.unread():
        if key in SWITCHED_OFF:
            allowed, default = SWITCHED_OFF[key]
            fields.demand(key, allowed, default)
        elif key not in IRRELEVANT and not key.startswith("_"):
            raise CheckpointError(
                f"{fields.where} sets {key!r} to {fields.raw[key]!r}, a key that trimtab does not know; it "
                "could change the model's numbers, so the model is not loaded"
            )


def _token_ids(value: Any, key: str, where: str) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        raise CheckpointError(f"{where} sets {key!r} to {value!r}; it must be a token id or a list of them")
    return tuple(listed)


def _first(values: tuple[int, ...]) -> int | None:
    return values[0] if values else None


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content
