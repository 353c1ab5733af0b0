"""How fast a run is against what the machine could do: operations of a step over measured matrix products.

The operations are those of the model itself (PaLM's model FLOPs utilisation, arXiv 2204.02311, appendix B):
what activation checkpointing computes again does not count.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable

import torch
from torch import nn

from trimtab.models import costs
from trimtab.models.transformer import Model

SMALLEST, LARGEST = 256, 8192  # of the square matrices whose product is timed
ENOUGH = 0.02  # seconds that a product has to take to be told from the clock
REPEATS = 5


def training_flops(model: Model, module: nn.Module, lengths: Iterable[int]) -> float:
    """Operations of one step over segments of `lengths`: forward, and backward for what is trained.

    The backward pass has a product for the inputs of each matrix and one for its weights; the latter is
    counted for the trainable share of `module`'s parameters.
    """
    head = 2 * model.config.vocab_size * model.config.hidden_size
    # `prefill_flops` counts the logits of one token; a training segment has them for all.
    forward = sum(costs.prefill_flops(model.config, n) + head * (n - 1) for n in lengths)
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    trained = sum(n for n, trains in sizes if trains) / sum(n for n, _ in sizes)
    return forward * (2 + trained)


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product of `dtype` on `device` when first asked."""
    n = SMALLEST
    while (seconds := _product_seconds(n, device, dtype)) < ENOUGH and n < LARGEST:
        n *= 2
    return 2 * n**3 / min(seconds, *(_product_seconds(n, device, dtype) for _ in range(REPEATS - 1)))


def _product_seconds(n: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    float((a[:8] @ b)[0, 0])  # so that nothing is set up or still running
    start = time.perf_counter()
    float((a @ b)[0, 0])  # reading a number waits for the device
    return time.perf_counter() - start
