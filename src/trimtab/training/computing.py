"""Where a model is trained and what is saved there: device, precision, recomputation, compilation."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils.checkpoint import checkpoint

from trimtab.models.checkpoint import parse_device
from trimtab.models.transformer import DecoderLayer, Model
from trimtab.training.recipe import Recipe


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return parse_device(name)


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager:
    """What a forward pass runs in: bfloat16 matrix products where the recipe says so."""
    if recipe.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def prepare_layers(model: Model, recipe: Recipe) -> None:
    """Let the layers recompute in the backward pass and compile their parts, as the recipe says.

    Both leave the names of parameters and the functions that are computed as they are.
    """
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        if recipe.compile:
            # Attention stays outside: its shapes depend on the texts, and it has kernels of its own.
            for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.feed_forward):
                part.compile(dynamic=True)
        if recipe.activation_checkpointing:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
