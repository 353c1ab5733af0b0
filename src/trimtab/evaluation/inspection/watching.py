"""Greedy decoding of one text in plain torch that tells where each head looked, and can switch heads off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.models.rotary import rotate
from trimtab.models.transformer import Model

Head = tuple[int, int]  # layer, query head


@dataclass(slots=True)
class Answer:
    """Tokens put out, and for each of them the index of the token that each head looked at most."""

    tokens: list[int] = field(default_factory=list)
    looked: list[Tensor] = field(default_factory=list)  # int64 [L, H]


class Watched:
    """One text under full attention; heads that are `off` add nothing, for the prompt as for the answer."""

    def __init__(self, model: Model, room: int, off: Iterable[Head] = ()) -> None:
        c = model.config
        self.model = model
        rows = (c.num_layers, c.num_kv_heads, room, c.head_dim)
        self._k = torch.empty(rows, dtype=model.dtype, device=model.device)
        self._v = torch.empty_like(self._k)
        self._on = torch.ones(c.num_layers, c.num_heads, dtype=model.dtype, device=model.device)
        for layer, head in off:
            self._on[layer, head] = 0
        self._looked = torch.zeros(c.num_layers, c.num_heads, dtype=torch.int64)
        self.length = 0

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> tuple[int, Tensor]:
        """Take in `tokens`; the likeliest next one, and where the last query's heads looked most [L, H]."""
        ids = torch.tensor(tokens, device=self.model.device)
        positions = torch.arange(self.length, self.length + len(tokens), device=self.model.device)
        self._cos_sin = self.model.rotary.cos_sin(positions)
        hidden = self.model.run(ids, positions, self._attend)
        self.length += len(tokens)
        return int(self.model.logits(hidden[-1]).argmax()), self._looked.clone()

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.length + len(q)
        q, k = rotate(q, *self._cos_sin), rotate(k, *self._cos_sin)
        self._k[layer, :, self.length : end] = k.transpose(0, 1)
        self._v[layer, :, self.length : end] = v.transpose(0, 1)
        keys, values = self._k[layer, :, :end], self._v[layer, :, :end]
        at = torch.arange(end, device=q.device)
        distance = at[self.length :, None] - at
        seen = (distance >= 0) & (distance < (self.model.config.sliding_windows[layer] or end))
        last = q[-1].unflatten(0, (len(keys), -1)).float() @ keys.float().transpose(1, 2)  # [G, H / G, end]
        self._looked[layer] = last.flatten(0, 1).masked_fill(~seen[-1], -torch.inf).argmax(-1).cpu()
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=seen[None, None],
            enable_gqa=q.shape[1] != len(keys),
        )
        return out[0].transpose(0, 1) * self._on[layer, :, None]


def answer(
    model: Model, prompt: list[int], most: int, stops: frozenset[int], off: Iterable[Head] = ()
) -> Answer:
    """The greedy answer to `prompt`, at most `most` tokens, without the stop token that ends it."""
    text, found = Watched(model, len(prompt) + most, off), Answer()
    token, looked = text.feed(prompt)
    while token not in stops:
        found.tokens.append(token)
        found.looked.append(looked)
        if len(found.tokens) == most:
            break
        token, looked = text.feed([token])
    return found
