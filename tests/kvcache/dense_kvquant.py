"""KVQuant once more, dense and slow: rows are replaced by what their codes mean."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcache.dense import Dense
from trimtab.attachment import Attachment
from trimtab.models.rotary import rotate
from trimtab.models.transformer import Model


@dataclass
class DenseKVQuant(Dense):
    """`per_token_keys` is the ablation without calibration: a key's range is its own, as a value's is."""

    attachment: Attachment | None = None
    bits: int = 3
    sinks: int = 1
    outliers: float = 0.01
    room: int = 10**9  # outlying keys of 16 tokens
    nuq: bool = True
    q_norm: bool = False
    pre_rope: bool = True
    per_token_keys: bool = False
    done: int = 0
    used: dict[tuple[int, int], int] = field(default_factory=dict)  # (layer, page): keys listed

    def attend(self, model: Model, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = model.rotary.cos_sin(torch.arange(self.length + 1))
        if not self.pre_rope:
            k = rotate(k, cos[-1:], sin[-1:])
        self.append(layer, k, v)
        keys = self.k[layer]
        if self.pre_rope:
            keys = rotate(keys.transpose(0, 1), cos, sin).transpose(0, 1)
        p = self.probabilities(rotate(q, cos[-1:], sin[-1:]), keys)
        return torch.einsum("gnt,gtd->gnd", p, self.v[layer]).flatten(0, 1)[None]

    def commit(self) -> None:
        first = max(self.done, self.sinks)
        if self.length < self.prompt_length or self.length <= first:
            return
        for layer in self.k:
            for held, coded in ((self.k[layer], self.keys), (self.v[layer], self.values)):
                rows = held[:, first : self.length]
                flat = rows.transpose(0, 1).flatten(1)
                rows.copy_(coded(layer, first, flat).unflatten(1, (len(rows), -1)).transpose(0, 1))
        self.done = self.length

    def keys(self, layer: int, first: int, x: Tensor) -> Tensor:
        """What the codes of keys x [n, width], rows `first` and later, mean."""
        if self.per_token_keys:
            return self.values(layer, first, x)
        assert self.attachment is not None
        ranges = self.attachment.tensors["k_range"][int(not self.pre_rope), int(self.outliers > 0), layer]
        low, high = ranges
        found = decoded(x, low, high, *self.book("k", layer))
        outside = ((x < low) | (x > high)) if self.outliers else torch.zeros_like(x)
        for row, c in outside.nonzero().tolist():
            page = (layer, (first + row) // 16)
            if self.used.get(page, 0) < self.room:
                self.used[page] = self.used.get(page, 0) + 1
                found[row, c] = x[row, c]
        return found

    def values(self, layer: int, first: int, x: Tensor) -> Tensor:
        """The range is that of a row in which the median has taken the place of its outliers."""
        outside = torch.zeros_like(x, dtype=torch.bool)
        if self.outliers:
            high, low = (x.double().quantile(t, -1, keepdim=True) for t in self.percentiles)
            outside = (x > high) | (x < low)
        inner = torch.where(outside, x.median(-1, keepdim=True).values, x)
        low, high = inner.amin(-1, keepdim=True), inner.amax(-1, keepdim=True)
        middle, half = ((high + y * low) / 2 for y in (1, -1))
        middle, half = middle.half().float(), half.half().float()
        return torch.where(outside, x, decoded(x, middle - half, middle + half, *self.book("v", layer)))

    @property
    def percentiles(self) -> tuple[float, float]:
        return 1 - self.outliers / 2, self.outliers / 2

    def book(self, what: str, layer: int) -> tuple[Tensor, Tensor]:
        """To code with, and to decode with."""
        if not self.nuq:
            uniform = torch.linspace(-1, 1, 2**self.bits)
            return uniform, uniform
        assert self.attachment is not None
        tensors, part = self.attachment.tensors, int(self.outliers > 0)
        place = (part, layer) if what == "v" else (int(not self.pre_rope), part, layer)
        book = tensors[f"{what}_codebook_{self.bits}"][place]
        if not self.q_norm:
            return book, book
        mean, deviation, new_mean, new_deviation = tensors[f"{what}_moments_{self.bits}"][place]
        return book, (book - new_mean) / new_deviation * deviation + mean


def decoded(x: Tensor, low: Tensor, high: Tensor, book: Tensor, meant: Tensor) -> Tensor:
    """The nearest entry of `book` between `low` and `high`, and what it means."""
    middle, half = (high + low) / 2, (high - low) / 2
    z = torch.where(half > 0, (x - middle) / half, 0.0)
    return meant[(z[..., None] - book).abs().argmin(-1)] * half + middle


@torch.no_grad()
def loss_at_once(model: Model, policy: DenseKVQuant | None, tokens: list[int]) -> float:
    """Mean next-token loss of a text, every token coded as soon as it is past, in one forward pass.

    A row attends to itself in full and to what is before it as coded. None codes nothing.
    """
    n = len(tokens)
    cos, sin = model.rotary.cos_sin(torch.arange(n))
    before = torch.ones(n, n, dtype=torch.bool).tril(-1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = rotate(q, cos, sin).unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
        turned = rotate(k, cos, sin)
        past_k, past_v = turned, v
        if policy is not None:
            raw = k if policy.pre_rope else turned
            past_k, past_v = raw.clone(), v.clone()
            for held, coded in ((past_k, policy.keys), (past_v, policy.values)):
                flat = held[policy.sinks :].flatten(1)
                held[policy.sinks :] = coded(layer, policy.sinks, flat).view_as(held[policy.sinks :])
            past_k = rotate(past_k, cos, sin) if policy.pre_rope else past_k
        scores = torch.einsum("ngxd,tgd->gxnt", grouped, past_k).masked_fill(~before, -torch.inf)
        own = torch.einsum("ngxd,ngd->gxn", grouped, turned)
        p = torch.cat([scores, own[..., None]], -1).softmax(-1)
        out = torch.einsum("gxnt,tgd->ngxd", p[..., :-1], past_v)
        return (out + torch.einsum("gxn,ngd->ngxd", p[..., -1], v)).flatten(1, 2)

    ids = torch.tensor(tokens)
    logits = model.logits(model.run(ids, torch.arange(n), attend))
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]))
