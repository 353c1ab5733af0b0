"""Rotations folded into a model's weights, so that keys and values leave the projections already rotated.

The function of the model stays what it was up to rounding, once the attention undoes the keys' rotation:
values come out of attention rotated, and the output projection takes that back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.kernels.reference_per_layer import transformed
from trimtab.models.transformer import Model


@torch.no_grad()
def fold_rotation(model: Model, key_block: int, value_block: int, order: Tensor | None = None) -> Model:
    """A copy of `model` whose keys and values are Hadamard-transformed, `*_block` channels at a time.

    `value_block` divides the head size. `order` int64 [layers, G * d]: key channel c of layer l becomes the
    transformed channel order[l, c]. A model with a norm on its keys leaves them as they are, since the norm
    comes after the projection. Folded weights are computed in float64 and rounded to the model's type; all
    others are shared with `model`. Raises ConfigError for quantized weights, which cannot be rotated.
    """
    if model.weights != "plain":
        raise ConfigError(
            f"a rotation is folded into plain weights, and the model was loaded with weights={model.weights};"
            f" load it without, and set weights={model.weights} in the plan, where it comes after folding"
        )
    weights = dict(model.state_dict())
    for layer in range(model.config.num_layers):
        at = f"model.layers.{layer}.self_attn."
        for name in (f"{at}v_proj.weight", f"{at}v_proj.bias"):
            if name in weights:
                weights[name] = _channels(weights[name], value_block)
        output = weights[f"{at}o_proj.weight"]
        weights[f"{at}o_proj.weight"] = transformed(output.double(), value_block).to(output.dtype)
        if model.config.qk_norm:
            continue
        for name in (f"{at}k_proj.weight", f"{at}k_proj.bias"):
            if name in weights:
                rotated = _channels(weights[name], key_block)
                weights[name] = rotated if order is None else rotated[order[layer].to(rotated.device)]
    with torch.device("meta"):
        copy = Model(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.tokenizer, copy.path = model.tokenizer, model.path
    return copy.eval()


def _channels(weight: Tensor, block: int) -> Tensor:
    """`weight` [channels, ...] with its channels transformed."""
    wide = weight.double().reshape(len(weight), -1)
    return transformed(wide.t(), block).t().reshape(weight.shape).to(weight.dtype).contiguous()
