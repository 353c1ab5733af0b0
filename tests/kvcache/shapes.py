"""A `KVShape` for tests of memory: the torch kernels, no model."""

from __future__ import annotations

import functools
from typing import Any

import torch

from trimtab.kernels.reference import TorchKernels
from trimtab.kvcache.base import KVShape
from trimtab.models.rotary import Rotary
from trimtab.models.shapes import shape


@functools.cache
def _rotary(head_dim: int) -> Rotary:
    return Rotary(shape("125m").rope, head_dim)


def make_shape(**changes: Any) -> KVShape:
    layers, heads = changes.pop("layers", 2), changes.pop("kv_heads", 2)
    head_dim = changes.pop("head_dim", 16)
    values = dict(
        num_layers=layers,
        num_heads=2 * heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        windows=(None,) * layers,
        max_length=2000,
        max_sequences=3,
        max_step_tokens=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        rotary=_rotary(head_dim),
        kernels=TorchKernels(),
        attachments=None,  # no policy with an attachment is made of a shape alone
    )
    return KVShape(**(values | changes))
