"""RotateKV once more, dense: matrices instead of fast transforms, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcache.dense import Dense
from trimtab.models.rotary import rotate
from trimtab.models.transformer import Model


def walsh_hadamard(n: int) -> Tensor:
    """The orthonormal matrix [n, n] by Sylvester's construction."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / n**0.5


def affine(x: Tensor, bits: int, group: int, clip: float) -> Tensor:
    """Min-max codes of each token's groups of channels, with a whole zero point; constants in float16."""
    groups = x.unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True) * clip, groups.amax(-1, keepdim=True) * clip
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = -((-low / scale).round() * scale).half().float()
    codes = ((groups - zero) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + zero).flatten(-2)


@dataclass
class DenseRotateKV(Dense):
    """`rotation=False` and `sinks=0` is plain rounding to nearest, per token."""

    bits: int = 2
    group: int = 32
    heads: int = 2  # KV heads rotated together
    clip: float = 1.0
    sinks: int = 0
    rotation: bool = True
    pre_rope: bool = True
    largest: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def attend(self, model: Model, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.tensor([self.length])
        if not self.pre_rope:
            k = rotate(k, *model.rotary.cos_sin(at))
        self.append(layer, k, v)
        if self.length < self.prompt_length and self.sinks:
            found = self.inputs[layer][0].abs().sort(descending=True).values[: self.sinks]
            mine = [(-float(x), self.length) for x in found]
            self.largest[layer] = sorted(self.largest.get(layer, []) + mine)[: self.sinks]
        keys, values = self.see(layer)
        if self.pre_rope:
            cos, sin = model.rotary.cos_sin(torch.arange(keys.shape[1]))
            keys = rotate(keys.transpose(0, 1), cos, sin).transpose(0, 1)
        p = self.probabilities(rotate(q, *model.rotary.cos_sin(at)), keys)
        return torch.einsum("gnt,gtd->gnd", p, values).flatten(0, 1)[None]

    def see(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.k[layer].clone(), self.v[layer].clone()
        if self.length < self.prompt_length or not self.length:
            return k, v
        kept = {token for _, token in self.largest.get(layer, [])}
        coded = [i for i in range(self.length) if i not in kept]
        groups, d = k.shape[0], k.shape[2]
        key_turn = torch.block_diag(*[walsh_hadamard(self.heads * d)] * (groups // self.heads))
        value_turn = torch.block_diag(*[walsh_hadamard(d)] * groups)
        for x, turn in ((k, key_turn), (v, value_turn)):
            if not self.rotation:
                turn = torch.eye(groups * d)
            rows = x[:, coded].transpose(0, 1).flatten(1) @ turn
            back = affine(rows, self.bits, self.group, self.clip) @ turn
            x[:, coded] = back.unflatten(1, (groups, d)).transpose(0, 1)
        return k, v
