"""Each policy once more, dense, slow and obviously right: one text, one token at a time, plain lists of rows.

`score(model, policy, context, continuation)` gives what `Engine.score` must give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.models.rotary import rotate
from trimtab.models.transformer import Model


def quantized(x: Tensor, bits: int, group: int, axis: int) -> Tensor:
    """Min-max quantization of groups of `group` along `axis`, constants rounded to float16."""
    x = x.transpose(axis, -1)
    groups = x.unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, zero = ((high - low) / (2**bits - 1)).half().to(x.dtype), low.half().to(x.dtype)
    codes = ((groups - zero) / scale).round().clamp(0, 2**bits - 1).nan_to_num(0.0)
    return (codes * scale + zero).flatten(-2).transpose(axis, -1)


@dataclass
class Dense:
    """The full cache; the others change how rows are kept (`commit`) or seen (`see`)."""

    prompt_length: int = 0
    length: int = 0
    k: dict[int, Tensor] = field(default_factory=dict)  # layer: [G, T, d], rotated
    v: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)  # layer: [1, D], what enters it now

    def attend(self, model: Model, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.tensor([self.length])
        cos, sin = model.rotary.cos_sin(at)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self.append(layer, k, v)
        keys, values = self.see(layer)
        p = self.probabilities(q, keys)
        self.note(layer, q, p)
        return torch.einsum("gnt,gtd->gnd", self.weights(layer, p), values).flatten(0, 1)[None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        self.k[layer] = torch.cat([self.k[layer], k], 1) if layer in self.k else k
        self.v[layer] = torch.cat([self.v[layer], v], 1) if layer in self.v else v

    def probabilities(self, q: Tensor, keys: Tensor) -> Tensor:
        """[G, group, T] of one query row [1, H, d]."""
        grouped = q[0].unflatten(0, (keys.shape[0], -1))
        return (torch.einsum("gnd,gtd->gnt", grouped, keys) / math.sqrt(q.shape[-1])).softmax(-1)

    def see(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.k[layer], self.v[layer]

    def weights(self, layer: int, p: Tensor) -> Tensor:
        """What values are weighed with, given the probabilities."""
        return p

    def note(self, layer: int, q: Tensor, p: Tensor) -> None: ...

    def commit(self) -> None: ...


@dataclass
class DenseStreaming(Dense):
    """Keys are kept unrotated; at each step row r of the cache is at position r."""

    sinks: int = 4
    window: int = 28

    def attend(self, model: Model, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.append(layer, k, v)
        total = self.k[layer].shape[1]
        first = [i for i in range(total) if i < self.sinks]
        kept = first + [i for i in range(total) if i >= self.sinks and i >= total - self.window]
        cos, sin = model.rotary.cos_sin(torch.arange(len(kept)))
        keys = rotate(self.k[layer][:, kept].transpose(0, 1), cos, sin).transpose(0, 1)
        p = self.probabilities(rotate(q, cos[-1:], sin[-1:]), keys)
        return torch.einsum("gnt,gtd->gnd", p, self.v[layer][:, kept]).flatten(0, 1)[None]


@dataclass
class DenseKivi(Dense):
    """`by_channel`: groups of tokens share constants in K (KIVI); else groups of channels (per token).

    `chunk`: tokens of the prompt after which it is packed so far; 0 = at its end.
    """

    bits: int = 2
    group: int = 16
    residual: int = 32
    by_channel: bool = True
    chunk: int = 0

    def packed(self, held: int) -> tuple[int, int]:
        """Keys and values packed of `held` rows."""
        return held // self.residual * self.residual, max(0, held - self.residual)

    def see(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.k[layer].clone(), self.v[layer].clone()
        held = k.shape[1] - 1  # the newest row is not committed
        if self.length < self.prompt_length:
            held = held // self.chunk * self.chunk if self.chunk else 0
        keys, values = self.packed(held)
        if keys:
            k[:, :keys] = quantized(k[:, :keys], self.bits, self.group, 1 if self.by_channel else 2)
        if values:
            v[:, :values] = quantized(v[:, :values], self.bits, self.group, 2)
        return k, v


@dataclass
class DenseRtn(DenseKivi):
    residual: int = 0
    by_channel: bool = False

    def packed(self, held: int) -> tuple[int, int]:
        return max(0, held - self.residual), max(0, held - self.residual)


@dataclass
class DenseH2O(Dense):
    budget: int = 40
    recent: int = 20
    percent: int | None = None  # the budget as a share of the prompt so far, half of it recent
    chunk: int | None = None
    received: dict[int, Tensor] = field(default_factory=dict)  # layer: [G, T], rows lost are -inf

    def see(self, layer: int) -> tuple[Tensor, Tensor]:
        old = self.received.get(layer, torch.zeros(self.k[layer].shape[0], 0))
        self.received[layer] = torch.cat([old, torch.zeros(len(old), 1)], 1)
        return self.k[layer], self.v[layer]

    def probabilities(self, q: Tensor, keys: Tensor) -> Tensor:
        [received] = [r for r in self.received.values() if r.shape[1] == keys.shape[1]][-1:]
        grouped = q[0].unflatten(0, (keys.shape[0], -1))
        scores = torch.einsum("gnd,gtd->gnt", grouped, keys) / math.sqrt(q.shape[-1])
        return scores.masked_fill((received == -torch.inf)[:, None], -torch.inf).softmax(-1)

    def note(self, layer: int, q: Tensor, p: Tensor) -> None:
        self.received[layer] = self.received[layer] + p.sum(1)

    def commit(self) -> None:
        if self.length < self.prompt_length and not (self.chunk and self.length % self.chunk == 0):
            return
        if self.percent is not None:
            self.budget = max(2, min(self.length, self.prompt_length) * self.percent // 100)
            self.recent = max(1, round(self.budget / 2))
        for received in self.received.values():
            for scores in received:
                held = (scores > -torch.inf).nonzero()[:, 0].tolist()
                old = [i for i in held if i < self.length - self.recent]
                for i in sorted(old, key=lambda i: float(scores[i]))[: max(0, len(held) - self.budget)]:
                    scores[i] = -torch.inf


@dataclass
class DenseSnapKV(Dense):
    budget: int = 48
    window: int = 16
    kernel: int = 5
    pooling: str = "avg"
    votes: dict[int, Tensor] = field(default_factory=dict)  # layer: [G, T]

    def note(self, layer: int, q: Tensor, p: Tensor) -> None:
        if self.prompt_length - self.window <= self.length < self.prompt_length:
            mine = torch.zeros(p.shape[0], self.prompt_length)
            mine[:, : p.shape[2]] = p.sum(1)
            self.votes[layer] = self.votes.get(layer, 0) + mine

    def commit(self) -> None:
        if self.length != self.prompt_length or self.prompt_length <= self.budget:
            return
        rest, half = self.prompt_length - self.window, self.kernel // 2
        for layer, votes in self.votes.items():
            kept = []
            for row in votes[:, :rest].tolist():
                around = [row[max(0, i - half) : i + half + 1] for i in range(rest)]
                if self.pooling == "avg":
                    smooth = [sum(a) / self.kernel for a in around]
                else:
                    smooth = [max(a) for a in around]
                best = sorted(range(rest), key=lambda i: -smooth[i])[: self.budget - self.window]
                kept.append(sorted(best) + list(range(rest, self.prompt_length)))
            index = torch.tensor(kept)[..., None].expand(-1, -1, self.k[layer].shape[2])
            self.k[layer], self.v[layer] = self.k[layer].gather(1, index), self.v[layer].gather(1, index)


@dataclass
class DenseSnapKVInKivi(DenseKivi, DenseSnapKV): ...


@dataclass
class DenseH2OInRtn(DenseRtn, DenseH2O):
    def see(self, layer: int) -> tuple[Tensor, Tensor]:
        DenseH2O.see(self, layer)
        return DenseRtn.see(self, layer)


@torch.no_grad()
def score(model: Model, policy: Dense, context: list[int], continuation: list[int]) -> list[float]:
    """Log-probabilities of the continuation under the policy."""
    policy.prompt_length = len(context)
    policy.inputs = {layer: torch.empty(0) for layer in range(model.config.num_layers)}
    found = []
    tokens = context + continuation
    for i, token in enumerate(tokens[:-1]):
        hidden = model.run(
            torch.tensor([token]),
            torch.tensor([i]),
            lambda *call: policy.attend(model, *call),
            policy.inputs,
        )
        policy.length += 1
        policy.commit()
        if i + 1 >= len(context):
            found.append(float(model.logits(hidden)[0].double().log_softmax(-1)[tokens[i + 1]]))
    return found
