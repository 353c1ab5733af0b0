"""What is looked at between steps: the loss on held-out text, and texts that the model goes on with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimtab.models.transformer import Model
from trimtab.training.data.batch import Batch
from trimtab.training.distributed.ranks import MicroBatch

Generate = Callable[[Model, list[str]], list[str]]  # prompts to what the model goes on with, in order


@contextmanager
def as_used(module: nn.Module):
    """Within: no gradients, no dropout, and whatever is drawn does not change what training draws next."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        module.train(was_training)


def held_out_loss(
    micro_batches: Sequence[MicroBatch],
    loss: Callable[[Batch], torch.Tensor],
    units: Callable[[Batch], int],
) -> tuple[float, int]:
    """The sum of `loss` over the micro-batches in nats, and the units it is summed over."""
    total, count = 0.0, 0
    for micro in micro_batches:
        value = loss(micro.batch).item()
        if micro.counts:
            total += value
            count += units(micro.batch)
    return total, count


def validation_metrics(total: float, units: float, text_bytes: int | None) -> dict[str, Any]:
    """Nats and perplexity per unit (a token), and bits per byte of the `text_bytes` of the trained text."""
    mean = total / units
    found = {"validation_loss": mean, "validation_perplexity": math.exp(min(mean, 700.0))}
    if text_bytes:
        found["validation_bits_per_byte"] = total / math.log(2) / text_bytes
    return found
