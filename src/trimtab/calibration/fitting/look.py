"""One look at the keys and values that a model forms from a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.models.causal import CausalAttend

if TYPE_CHECKING:
    from trimtab.models.transformer import Model


@torch.no_grad()
def keys_and_values(model: Model, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer k and v float32 [T, G, d] of the text `tokens` [T]; k before rotary embedding."""
    keys, values, _ = _run(model, tokens)
    return [k.float() for k in keys], [v.float() for v in values]


def with_gradients(model: Model, tokens: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each layer k, v and the gradients of the text's mean next-token loss at them, float32 [T, G, d]."""
    with torch.enable_grad(), frozen(model):
        keys, values, hidden = _run(model, tokens)
        logits = model.logits(hidden)[:-1].float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[1:].to(logits.device))
        found = torch.autograd.grad(loss, keys + values)
    layers = zip(keys, values, found[: len(keys)], found[len(keys) :], strict=True)
    return [tuple(x.detach().float() for x in layer) for layer in layers]  # type: ignore[misc]


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Within, no parameter wants a gradient: the same operators run whether or not they do outside."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _run(model: Model, tokens: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    keys: list[Tensor] = []
    values: list[Tensor] = []
    tokens = tokens.to(model.device)
    causal = CausalAttend(model.config, model.rotary, tokens[None], None)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not k.requires_grad:
            k, v = k.requires_grad_(), v.requires_grad_()
        keys.append(k)
        values.append(v)
        return causal(layer, q, k, v)

    hidden = model.run(tokens, causal.positions, attend)
    return keys, values, hidden
