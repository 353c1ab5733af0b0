"""Retrieval heads once more, dense: all rows are kept, and what a head may not see is hidden from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.dense import Dense


@dataclass
class DenseRetrievalHeads(Dense):
    whole: tuple[tuple[int, int], ...] = ()  # (layer, KV head) that see everything
    sinks: int = 4
    window: int = 28
    layer: int = 0

    def see(self, layer: int) -> tuple[Tensor, Tensor]:
        self.layer = layer
        return self.k[layer], self.v[layer]

    def probabilities(self, q: Tensor, keys: Tensor) -> Tensor:
        total = keys.shape[1]
        hidden = torch.zeros(keys.shape[0], total, dtype=torch.bool)
        for head in range(keys.shape[0]):
            if (self.layer, head) not in self.whole:
                hidden[head, self.sinks : max(self.sinks, total - self.window)] = True
        grouped = q[0].unflatten(0, (keys.shape[0], -1))
        scores = torch.einsum("gnd,gtd->gnt", grouped, keys) / q.shape[-1] ** 0.5
        return scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
