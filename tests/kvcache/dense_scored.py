"""Dense twins of the policies that score all rows of a head at once: nothing is freed, rows are hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcache.dense import Dense
from trimtab.models.rotary import rotate
from trimtab.models.transformer import Model


@dataclass
class DenseScored(Dense):
    """`budget(tokens)` rows a head; every float is a float64 from the scores on."""

    budget: Callable[[int], int] = lambda tokens: 40
    chunk: int | None = None
    interval: int | None = None
    safeguard: float | None = None  # not None: the heads of a layer share their budget (Ada-KV)
    model: Model | None = None
    plain: dict[int, list[Tensor]] = field(default_factory=dict)  # layer: queries [H, d] before rotation
    turned: dict[int, list[Tensor]] = field(default_factory=dict)
    alive: dict[int, list[list[int]]] = field(default_factory=dict)  # layer: tokens held by each head
    most: int = 0  # rows a head held at most

    def attend(self, model: Model, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.model = model
        self.plain.setdefault(layer, []).append(q[0].double())
        for head in self.alive.setdefault(layer, [[] for _ in range(k.shape[1])]):
            head.append(self.length)
            self.most = max(self.most, len(head))
        self._layer = layer
        return super().attend(model, layer, q, k, v)

    def probabilities(self, q: Tensor, keys: Tensor) -> Tensor:
        hidden = torch.ones(keys.shape[:2], dtype=torch.bool)
        for head, tokens in enumerate(self.alive[self._layer]):
            hidden[head, tokens] = False
        grouped = q[0].unflatten(0, (keys.shape[0], -1))
        scores = torch.einsum("gnd,gtd->gnt", grouped, keys) / math.sqrt(q.shape[-1])
        return scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)

    def note(self, layer: int, q: Tensor, p: Tensor) -> None:
        self.turned.setdefault(layer, []).append(q[0].double())

    def commit(self) -> None:
        end = self.prompt_length
        inside = self.chunk is not None and self.length < end and self.length % self.chunk == 0
        after = self.interval is not None and self.length > end and (self.length - end) % self.interval == 0
        if not (inside or after or self.length == end):
            return
        keep = self.budget(min(self.length, end))
        for layer, heads in self.alive.items():
            if sum(map(len, heads)) > keep * len(heads):
                self.drop(layer, heads, keep)

    def drop(self, layer: int, heads: list[list[int]], keep: int) -> None:
        scores = [self.scores(layer, g, tokens) for g, tokens in enumerate(heads)]
        if self.safeguard is None:
            kept = [sorted(range(len(s)), key=lambda i, s=s: -s[i])[:keep] for s in scores]
        else:
            kept = [
                sorted(range(len(s)), key=lambda i, s=s: -s[i])[: int(keep * self.safeguard)] for s in scores
            ]
            rest = [(-x, g, i) for g, s in enumerate(scores) for i, x in enumerate(s) if i not in kept[g]]
            for _, g, i in sorted(rest)[: keep * len(heads) - sum(map(len, kept))]:
                kept[g].append(i)
        self.alive[layer] = [[tokens[i] for i in sorted(k)] for tokens, k in zip(heads, kept, strict=True)]

    def scores(self, layer: int, head: int, tokens: list[int]) -> list[float]:
        raise NotImplementedError

    def group(self, layer: int) -> int:
        return len(self.plain[layer][0]) // len(self.alive[layer])


@dataclass
class DenseVotes(DenseScored):
    """SnapKV."""

    window: int = 8
    kernel: int = 5

    def scores(self, layer: int, head: int, tokens: list[int]) -> list[float]:
        keys = self.k[layer][head, tokens].double()
        votes = torch.zeros(len(tokens), dtype=torch.float64)
        for asked in range(self.length - self.window, self.length):
            seen = [i for i, token in enumerate(tokens) if token <= asked]
            for h in range(head * self.group(layer), (head + 1) * self.group(layer)):
                weights = keys[seen] @ self.turned[layer][asked][h] / math.sqrt(keys.shape[1])
                votes[seen] += weights.softmax(0)
        rest, half = len(tokens) - self.window, self.kernel // 2
        smooth = [float(votes[max(0, i - half) : min(rest, i + half + 1)].sum()) for i in range(rest)]
        return smooth + [math.inf] * self.window


@dataclass
class DenseExpected(DenseScored):
    """Expected attention, by the formulas of the paper: the mean rotation as a matrix."""

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0

    def scores(self, layer: int, head: int, tokens: list[int]) -> list[float]:
        assert self.model is not None
        asked = torch.stack(self.plain[layer][self.sinks :])  # [n, H, d]
        d = asked.shape[2]
        cos, sin = self.model.rotary.cos_sin(torch.arange(self.length, self.length + self.future))
        turn = (
            rotate(torch.eye(d).expand(self.future, d, d), cos, sin).double().mean(0).T
        )  # turned q = turn q
        tokens = tokens[self.sinks :]
        keys, values = self.k[layer][head, tokens].double(), self.v[layer][head, tokens].double()
        total = torch.zeros(len(tokens), dtype=torch.float64)
        for h in range(head * self.group(layer), (head + 1) * self.group(layer)):
            mean = turn @ asked[:, h].mean(0)
            spread = turn @ torch.cov(asked[:, h].T, correction=0) @ turn.T
            weight = keys @ mean / math.sqrt(d) + torch.einsum("ni,ij,nj->n", keys, spread, keys) / (2 * d)
            total += weight.softmax(0)
        score = (total / self.group(layer) + self.epsilon) * values.norm(dim=1)
        return [math.inf] * self.sinks + score.tolist()
