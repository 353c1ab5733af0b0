"""A running average of the weights (exponential moving average, Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trimtab.errors import CheckpointError
from trimtab.training.distributed.sharded import cut


class Ema:
    """The average of a module's trainable parameters, float32 like them.

    After step t it moves by `1 - min(decay, (1 + t) / (10 + t))` towards the weights, so that the start is
    forgotten soon.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._average = {n: p.detach().clone() for n, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, average in self._average.items():
            average.lerp_(self._weights[name], share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the module has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the average."""
        for name, weight in self._weights.items():
            kept = weight.detach().clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(kept)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The average under `ema.<parameter>`."""
        return {f"ema.{name}": value for name, value in self._average.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, value in self._average.items():
            if f"ema.{name}" not in tensors:
                raise CheckpointError(
                    "the checkpoint holds no averaged weights; leave 'ema' out of the recipe"
                )
            value.copy_(cut(tensors[f"ema.{name}"].to(value.device), value))
