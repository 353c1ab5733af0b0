"""Dense twins of the policies that keep a part of the cache in host memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcache.dense import Dense, DenseH2O, DenseH2OInRtn, DenseKivi, DenseRtn, DenseSnapKV, DenseSnapKVInKivi
from trimtab.models.rotary import rotate
from trimtab.models.transformer import Model


@dataclass
class DenseKCache(Dense):
    """Behind the prompt only the `n` largest probabilities of each query head weigh values."""

    n: int = 4
    renormalize: bool = False
    full_layers: int = 0

    def weights(self, layer: int, p: Tensor) -> Tensor:
        if self.length < self.prompt_length or layer < self.full_layers:
            return p
        top = p.topk(min(self.n, p.shape[-1]), -1)
        share = top.values / top.values.sum(-1, keepdim=True) if self.renormalize else top.values
        return p.new_zeros(p.shape).scatter(-1, top.indices, share)


@dataclass
class DenseSnapKVOnKCache(DenseKCache, DenseSnapKV): ...


@dataclass
class DenseH2OOnKCache(DenseKCache, DenseH2O): ...


@dataclass
class DenseKiviOnKCache(DenseKCache, DenseKivi): ...


@dataclass
class DenseRtnOnKCache(DenseKCache, DenseRtn): ...


@dataclass
class DenseSnapKVInKiviOnKCache(DenseKCache, DenseSnapKVInKivi): ...


@dataclass
class DenseH2OInRtnOnKCache(DenseKCache, DenseH2OInRtn): ...


@dataclass
class DenseSentenceKV(Dense):
    """Lists of row numbers, head by head. `tokens`: the text; `ends`: the tokens that end a sentence."""

    budget: int = 20
    factor: float = 2
    first: int = 4
    last: int = 8
    window: int = 8
    kernel: int = 7
    max_sentence: int = 12
    tokens: list[int] = field(default_factory=list)
    ends: tuple[int, ...] = ()
    sentences: list[list[int]] = field(default_factory=lambda: [[]])  # rows of each; the last is under way
    votes: dict[int, Tensor] = field(default_factory=dict)  # layer: [G, T]
    kept: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (layer, head): rows
    near: dict[tuple[int, int], set[int]] = field(default_factory=dict)  # those of them on the device
    asked: dict[int, list[Tensor]] = field(default_factory=dict)  # layer: queries [G, d] of the sentence
    crossed: int = 0  # rows (of one layer and head) brought from the host

    def attend(self, model: Model, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = model.rotary.cos_sin(torch.tensor([self.length]))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self.append(layer, k, v)
        grouped = q[0].unflatten(0, (k.shape[1], -1))
        scores = torch.einsum("gnd,gtd->gnt", grouped, self.k[layer]) / math.sqrt(q.shape[-1])
        if self.length >= self.prompt_length:
            self.asked.setdefault(layer, []).append(grouped.mean(1))
            for head, mine in enumerate(scores):
                hidden = torch.ones(mine.shape[-1], dtype=torch.bool)
                hidden[self.visible(layer, head)] = False
                mine.masked_fill_(hidden, -torch.inf)
        p = scores.softmax(-1)
        if self.prompt_length - self.window <= self.length < self.prompt_length:
            votes = self.votes.setdefault(layer, torch.zeros(len(p), self.prompt_length))
            votes[:, : p.shape[-1]] += p.sum(1)
        return torch.einsum("gnt,gtd->gnd", p, self.v[layer]).flatten(0, 1)[None]

    def visible(self, layer: int, head: int) -> list[int]:
        rows, near = self.kept[layer, head], self.near[layer, head]
        rows.append(self.length)
        if len(rows) <= self.budget:
            chosen = rows[:]
        elif len(self.asked[layer]) == 1:
            self.crossed += len(rows) - 1
            return rows[:]
        else:
            mean = torch.stack(self.asked[layer])[:, head].mean(0)
            chosen = rows[: self.first] + rows[-self.last :]
            for sentence in sorted(self.sentences, key=lambda s: -self.similarity(layer, head, s, mean)):
                free = [row for row in sentence if row in rows and row not in chosen]
                chosen += free[: self.budget - len(chosen)]
        self.crossed += len(set(chosen) - near - {self.length})
        near.clear()
        near.update(chosen)
        return chosen

    def similarity(self, layer: int, head: int, sentence: list[int], mean: Tensor) -> float:
        rows = [row for row in sentence if row in self.kept[layer, head]]
        if sentence is self.sentences[-1]:
            return math.inf
        return float(self.k[layer][head, rows].mean(0) @ mean) if rows else -math.inf

    def commit(self) -> None:
        self.sentences[-1].append(self.length - 1)
        ended = bool(self.tokens) and self.tokens[self.length - 1] in self.ends
        if ended or len(self.sentences[-1]) == self.max_sentence:
            self.sentences.append([])
            self.asked.clear()
        if self.length != self.prompt_length:
            return
        if self.sentences[-1]:
            self.sentences.append([])
        rest, half, most = (
            self.prompt_length - self.window,
            self.kernel // 2,
            round(self.factor * self.budget),
        )
        for layer, votes in self.votes.items():
            for head, row in enumerate(votes.tolist()):
                kept = list(range(self.prompt_length))
                if self.prompt_length > most:
                    # The pooling does not look over the edges of what it chooses from.
                    near = range(self.first, rest)
                    smooth = {i: max(row[max(self.first, i - half) : min(rest, i + half + 1)]) for i in near}
                    best = sorted(near, key=lambda i: -smooth[i])[: most - self.first - self.window]
                    kept = sorted([*range(self.first), *best, *range(rest, self.prompt_length)])
                self.kept[layer, head] = kept
                self.near[layer, head] = set(kept[: self.first] + kept[-self.last :])
