"""A larger model that computes what a smaller one does, to go on training from it.

New layers are put in evenly and begin as nothing: their projections back into the residual stream are
zero (as in Shen et al. 2022, arXiv 2203.06211, and LLaMA Pro, arXiv 2401.02415). New feed-forward units begin
the same way. So the first loss is the smaller model's last one.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import ConfigError
from trimtab.models.config import config_from_dict
from trimtab.models.shapes import random_model
from trimtab.models.transformer import MLP, DecoderLayer, Model

_SCALE = 0.5  # new matrices start at half the usual size: their outputs meet zeros first


def grow(model: Model, layers: int | None = None, intermediate: int | None = None, seed: int = 0) -> Model:
    """`model` with `layers` layers and feed-forward parts of `intermediate` units; neither may shrink.

    New layers stand evenly among the old ones, never first. Raises ConfigError for a smaller size and for
    models with experts.
    """
    old = model.config
    layers = old.num_layers if layers is None else layers
    intermediate = old.intermediate_size if intermediate is None else intermediate
    if layers < old.num_layers or intermediate < old.intermediate_size or old.moe is not None:
        raise ConfigError(
            f"a model of {old.num_layers} layers and {old.intermediate_size} feed-forward units cannot grow "
            f"to {layers} and {intermediate}; growing needs larger sizes and a model without experts"
        )
    changes: dict[str, Any] = {"num_hidden_layers": layers, "intermediate_size": intermediate}
    config = config_from_dict(dict(old.raw) | changes)
    grown = random_model(config, model.dtype, seed)
    kept = _old_places(old.num_layers, layers)
    with torch.no_grad():
        _copy_layers(model, grown, kept)
        grown.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
        grown.model.norm.weight.copy_(model.model.norm.weight)
        if model.lm_head is not None and grown.lm_head is not None:
            grown.lm_head.weight.copy_(model.lm_head.weight)
    grown.tokenizer, grown.path = model.tokenizer, model.path
    return grown


def _old_places(old: int, new: int) -> dict[int, int]:
    """Where each old layer stands among the new: {new place: old place}."""
    places = [(i * new) // old for i in range(old)]
    return {place: i for i, place in enumerate(places)}


def _copy_layers(model: Model, grown: Model, kept: dict[int, int]) -> None:
    for place, layer in enumerate(grown.model.layers):
        assert isinstance(layer, DecoderLayer)
        mlp = layer.feed_forward
        assert isinstance(mlp, MLP)
        if place not in kept:
            layer.self_attn.o_proj.weight.zero_()
            mlp.down_proj.weight.zero_()
            continue
        old = model.model.layers[kept[place]]
        assert isinstance(old, DecoderLayer) and isinstance(old.feed_forward, MLP)
        for name, parameter in old.named_parameters():
            target = layer.get_parameter(name)
            if parameter.shape == target.shape:
                target.copy_(parameter)
        rows = model.config.intermediate_size
        for name in ("gate_proj", "up_proj"):
            mlp.get_parameter(f"{name}.weight").mul_(_SCALE)
            for part, values in old.feed_forward.get_submodule(name).named_parameters():
                mlp.get_parameter(f"{name}.{part}")[:rows].copy_(values)
        mlp.down_proj.weight.zero_()
        mlp.down_proj.weight[:, :rows].copy_(old.feed_forward.get_parameter("down_proj.weight"))
