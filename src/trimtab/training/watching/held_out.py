"""What is looked at between steps: the loss on held-out text, and texts that the model goes on with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


def held_out_totals(
    micro_batches: Sequence[MicroBatch],
    sums: Callable[[Batch], Mapping[str, torch.Tensor]],
    units: Callable[[Batch], int],
) -> dict[str, float]:
    """Each of the `sums` over all micro-batches, the loss in nats, and the `units` they are summed over."""
    totals = {"units": 0.0}
    for micro in micro_batches:
        for name, value in sums(micro.batch).items():
            totals[name] = totals.get(name, 0.0) + (value.item() if micro.counts else 0.0)
        if micro.counts:
            totals["units"] += units(micro.batch)
    return totals


def validation_metrics(totals: Mapping[str, float], text_bytes: int | None) -> dict[str, Any]:
    """Means per unit, the perplexity, and bits per byte of the `text_bytes` of the trained text."""
    found = {f"validation_{name}": sum_ / totals["units"] for name, sum_ in totals.items() if name != "units"}
    found["validation_perplexity"] = math.exp(min(found["validation_loss"], 700.0))
    if text_bytes:
        found["validation_bits_per_byte"] = totals["loss"] / math.log(2) / text_bytes
    return found
