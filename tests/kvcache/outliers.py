"""Models whose keys have channels of outlying size, as large ones have, and which compute the same."""

from __future__ import annotations

import torch

from trimtab.models.transformer import Model


@torch.no_grad()
def with_outliers(model: Model, channels: int = 4, factor: float = 20.0, seed: int = 0) -> Model:
    """A copy of `model` in which `channels` channels of every key head are `factor` times as large and the
    queries' as much smaller: the same function up to rounding, unless keys are coded.

    Channels are drawn layer by layer, in rotary pairs (i, i + d / 2), which turn together. Parameters that
    stay as they are, are shared.
    """
    config, d = model.config, model.config.head_dim
    weights = dict(model.state_dict())
    g = torch.Generator().manual_seed(seed)
    for layer in range(config.num_layers):
        pairs = torch.randperm(d // 2, generator=g)[: channels // 2]
        scale = torch.ones(d, device=model.device)
        scale[torch.cat([pairs, pairs + d // 2])] = factor
        at = f"model.layers.{layer}.self_attn."
        for part, size in (("k", scale), ("q", 1 / scale)):
            # Where a norm follows the projection, its weight decides the size.
            names = ("norm.weight",) if config.qk_norm else ("proj.weight", "proj.bias")
            for name in (f"{part}_{name}" for name in names):
                held = weights.get(at + name)
                if held is not None:
                    by_head = held.float().unflatten(0, (-1, d))
                    scaled = by_head * size.view(1, d, *[1] * (held.dim() - 1))
                    weights[at + name] = scaled.flatten(0, 1).to(held.dtype)
    with torch.device("meta"):
        copy = Model(config)
    copy.load_state_dict(weights, assign=True)
    copy.tokenizer, copy.path = model.tokenizer, None
    return copy.eval()
