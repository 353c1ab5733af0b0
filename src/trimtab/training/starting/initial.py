"""Starting values for a model that is trained from nothing."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.models.config import ModelConfig
from trimtab.models.transformer import Model

EMBEDDING_STD = 0.02


def initial_model(config: ModelConfig, seed: int) -> Model:
    """A float32 model of this shape with starting weights, the same for the same seed.

    Matrices are normal with variance 1 / (3 inputs); those that write to the residual stream are smaller by
    sqrt(2 layers), so that the stream's size does not grow with depth (Radford et al. 2019). Embeddings and
    heads have deviation 0.02, norms are one and biases zero.
    """
    with torch.device("meta"):
        model = Model(config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    deep = (2 * config.num_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = (3 * parameter.shape[-1]) ** -0.5
            if "embed_tokens" in name or "lm_head" in name:
                std = EMBEDDING_STD
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= deep
            nn.init.normal_(parameter, std=std, generator=generator)
    return model
