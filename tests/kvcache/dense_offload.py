"""Dense twins of the policies that keep a part of the cache in host memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcache.dense import Dense, DenseH2O, DenseSnapKV


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
