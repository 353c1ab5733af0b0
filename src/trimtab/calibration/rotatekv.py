"""RotateKV's order of channels: those that are alike once keys are rotated lie side by side.

Su et al., RotateKV: Accurate and Robust 2-Bit KV Cache Quantization via Outlier-Aware Adaptive Rotations,
2025, arXiv 2501.16383.

Keys before rotary embedding, of `heads` neighbouring KV heads together, go through an orthonormal Hadamard
transform. The channels of a layer are then sorted by their signed sum over all tokens of the calibration
texts, so that a group that shares a scale and a zero holds channels of like size. As published.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.calibration.base import Calibration, CalibrationOptions, Progress
from trimtab.calibration.fitting.look import keys_and_values
from trimtab.errors import ConfigError
from trimtab.kernels.reference_per_layer import transformed
from trimtab.kvcache.rotatekv import key_block
from trimtab.registry import CALIBRATIONS, Card

if TYPE_CHECKING:
    from trimtab.models.transformer import Model


@dataclass(frozen=True, slots=True)
class RotateKVCalibrationOptions(CalibrationOptions):
    heads: int = field(
        default=4, metadata={"help": "neighbouring KV heads that are rotated together, at most"}
    )

    def __post_init__(self) -> None:
        CalibrationOptions.__post_init__(self)
        if self.heads < 1:
            raise ConfigError(f"option 'heads' is {self.heads}; it must be at least 1")


@CALIBRATIONS.add(
    options=RotateKVCalibrationOptions,
    card=Card(
        title="RotateKV calibration",
        idea="Sorts the channels of rotated keys by their signed sum: groups hold channels of like size.",
        exactness="As published; where the heads do not divide evenly, in smaller Hadamard blocks.",
        cost="One forward pass a text. Eight bytes a channel and layer come out.",
        needs="Texts like those that will be served.",
        avoid_when="The texts to be served differ much from any at hand.",
        paper="Su et al., RotateKV: Accurate and Robust 2-Bit KV Cache Quantization via Outlier-Aware "
        "Adaptive Rotations, 2025",
        arxiv="2501.16383",
    ),
)
class RotateKVCalibration(Calibration):
    @staticmethod
    def fit(
        model: Model, sequences: Tensor, options: Any, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`order` int64 [L, G * d]: stored channel c is rotated channel order[layer, c]."""
        c = model.config
        block = key_block(c.num_kv_heads, c.head_dim, options.heads)
        sums = torch.zeros(c.num_layers, c.num_kv_heads * c.head_dim, dtype=torch.float64)
        for number, tokens in enumerate(sequences):
            progress("channel sums", number / len(sequences))
            for layer, k in enumerate(keys_and_values(model, tokens)[0]):
                sums[layer] += transformed(k.flatten(1), block).double().sum(0).cpu()
        return {"order": sums.argsort(dim=1, stable=True)}, {}
