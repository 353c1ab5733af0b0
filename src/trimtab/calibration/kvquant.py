"""KVQuant's constants: thresholds of key channels, and codebooks where the loss is sensitive.

Hooper et al., KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization, 2024,
arXiv 2401.18079.

First look: for every channel of the keys the percentiles t and 1 - t, t = 1 - outliers / 2 (and, for a cache
without a sparse part, its extremes). Second look, with one backward pass of the language-model loss a text:
the Fisher weight of an element is its squared gradient at the output of k_proj or v_proj (after bias and
QK-norm, before rotary embedding). Per layer, and for K and V each, weighted k-means over the normalized
values that are no outliers gives a codebook of 2^bits centroids for 2, 3 and 4 bits. Also kept, for Q-Norm,
mean and deviation of these values before and after quantization. The first `sinks` tokens are left out.

As published, with two liberties: both looks go text by text, so that memory does not grow with the data, and
k-means runs on a histogram of 8,192 bins. All of it is made twice, for keys before and after rotary
embedding: the latter serve the comparison alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.calibration.base import Calibration, CalibrationOptions, Progress
from trimtab.calibration.fitting.clusters import centroids
from trimtab.calibration.fitting.look import keys_and_values, with_gradients
from trimtab.errors import ConfigError
from trimtab.kernels.nuq import edges, normalized, outliers_per_side
from trimtab.models.rotary import rotate
from trimtab.registry import CALIBRATIONS, Card

if TYPE_CHECKING:
    from trimtab.models.transformer import Model

BITS = (2, 3, 4)
_BINS = 8192


@dataclass(frozen=True, slots=True)
class KVQuantCalibrationOptions(CalibrationOptions):
    outliers: float = field(default=0.01, metadata={"help": "share of the keys beyond the thresholds"})
    sinks: int = field(default=1, metadata={"help": "first tokens of a text, left out"})

    def __post_init__(self) -> None:
        CalibrationOptions.__post_init__(self)
        if not 0 < self.outliers <= 0.1:
            raise ConfigError(f"option 'outliers' is {self.outliers}; it must be above 0 and at most 0.1")
        if not 0 <= self.sinks < self.tokens - 1:
            raise ConfigError(
                f"option 'sinks' is {self.sinks}; it must be at least 0 and leave two of the "
                f"{self.tokens} tokens"
            )


@CALIBRATIONS.add(
    options=KVQuantCalibrationOptions,
    card=Card(
        title="KVQuant calibration",
        idea="Thresholds for every key channel, and codebooks of 2, 3 and 4 bits fitted by Fisher-weighted "
        "k-means.",
        exactness="As published, k-means on a histogram of 8,192 bins; also made for keys after rotary "
        "embedding, for comparison.",
        cost="Two forward passes and one backward pass a text. A few kilobytes a layer come out.",
        needs="Texts like those that will be served; 16 of 2,048 tokens are usual.",
        avoid_when="The texts to be served differ much from any at hand: thresholds are static.",
        paper="Hooper et al., KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache "
        "Quantization, 2024",
        arxiv="2401.18079",
    ),
)
class KVQuantCalibration(Calibration):
    @staticmethod
    def fit(
        model: Model, sequences: Tensor, options: Any, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, where axes of 2 are: keys (before, after rotary embedding), part (dense, with sparse).

        `k_range` float32 [2, 2, L, 2, G * d]: the lower and upper threshold of each channel.
        `k_codebook_BITS` float32 [2, 2, L, 2^bits], `v_codebook_BITS` [2, L, 2^bits] (part first).
        `k_moments_BITS` float32 [2, 2, L, 4], `v_moments_BITS` [2, L, 4]: mean and deviation before
        quantization, then after it.
        """
        c, n = model.config, len(sequences)
        length = sequences.shape[1] - options.sinks
        if length < 2:
            raise ConfigError(
                f"texts of {sequences.shape[1]} tokens leave nothing to fit after {options.sinks} sinks"
            )
        cos, sin = model.rotary.cos_sin(torch.arange(sequences.shape[1], device=model.device))

        def views(x: Tensor) -> tuple[Tensor, Tensor]:
            """Keys, or their gradients, before and after rotary embedding, [tokens, G * d] without sinks."""
            both = x, rotate(x, cos, sin)
            return both[0][options.sinks :].flatten(1), both[1][options.sinks :].flatten(1)

        extremes = [[_Extremes(n * length, options.outliers) for _ in range(2)] for _ in range(c.num_layers)]
        for number, tokens in enumerate(sequences):
            progress("thresholds", number / n / 3)
            for layer, k in enumerate(keys_and_values(model, tokens)[0]):
                for kept, x in zip(extremes[layer], views(k), strict=True):
                    kept.add(x)
        k_range = torch.stack([torch.stack([e.ranges() for e in both]) for both in extremes])
        k_range = k_range.permute(
            1, 2, 0, 3, 4
        ).contiguous()  # [layer, view, part, ..] to [view, part, layer, ..]

        k_bins = [[[_Histogram() for _ in extremes] for _ in range(2)] for _ in range(2)]
        v_bins = [[_Histogram() for _ in extremes] for _ in range(2)]
        for number, tokens in enumerate(sequences):
            progress("codebooks", (1 + 2 * number / n) / 3)
            for layer, (k, v, k_gradient, v_gradient) in enumerate(with_gradients(model, tokens)):
                pairs = zip(views(k), views(k_gradient), strict=True)
                for view, (x, gradient) in enumerate(pairs):
                    for part in range(2):
                        low, high = k_range[view, part, layer].to(x.device)
                        k_bins[view][part][layer].add(normalized(x, low, high), gradient)
                values, gradient = v[options.sinks :].flatten(1), v_gradient[options.sinks :].flatten(1)
                for part in range(2):
                    low, high = token_range(values, options.outliers if part else 0.0)
                    v_bins[part][layer].add(normalized(values, low, high), gradient)

        tensors = {"k_range": k_range}
        for bits in BITS:
            keys = [[[h.fit(bits) for h in part] for part in view] for view in k_bins]
            values = [[h.fit(bits) for h in part] for part in v_bins]
            for i, what in enumerate(("codebook", "moments")):
                tensors[f"k_{what}_{bits}"] = _stack([[[x[i] for x in p] for p in view] for view in keys])
                tensors[f"v_{what}_{bits}"] = _stack([[x[i] for x in p] for p in values])
        return tensors, {}


def token_range(v: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest [tokens, 1] of each row of `v` [tokens, width] that is no outlier.

    The published method puts the row's median where outliers were, which changes neither.
    """
    side = outliers_per_side(outliers, v.shape[1])
    ordered = v.sort(-1).values
    return ordered[:, side : side + 1], ordered[:, v.shape[1] - 1 - side :][:, :1]


class _Extremes:
    """The largest and smallest of `count` rows to come, for each column, as many as the percentiles need."""

    def __init__(self, count: int, outliers: float) -> None:
        self.place = (count - 1) * outliers / 2  # of the percentile, counted from an end
        self.size = int(self.place) + 2
        self.high = self.low = torch.empty(0)

    def add(self, x: Tensor) -> None:
        high, low = (x, -x) if not len(self.high) else (torch.cat([self.high, x]), torch.cat([self.low, -x]))
        size = min(self.size, len(high))
        self.high, self.low = high.topk(size, 0).values, low.topk(size, 0).values

    def ranges(self) -> Tensor:
        """float32 [2, 2, columns]: lower and upper end, of all rows and between the percentiles."""
        at, share = int(self.place), self.place - int(self.place)
        inner = [torch.lerp(x[at], x[min(at + 1, len(x) - 1)], share) for x in (self.low, self.high)]
        return torch.stack(
            [torch.stack([-self.low[0], self.high[0]]), torch.stack([-inner[0], inner[1]])]
        ).cpu()


class _Histogram:
    """Normalized values between -1 and 1, counted and weighted."""

    def __init__(self) -> None:
        self.count = torch.zeros(_BINS, dtype=torch.float64)
        self.weight = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        inside = x.abs() <= 1
        x, weight = x[inside].double().cpu(), gradient[inside].double().square().cpu()
        bins = ((x + 1) / 2 * _BINS).long().clamp(max=_BINS - 1)
        self.count += torch.bincount(bins, minlength=_BINS)
        self.weight += torch.bincount(bins, weight, minlength=_BINS)

    def fit(self, bits: int) -> tuple[Tensor, Tensor]:
        """The codebook [2^bits], and mean and deviation before and after quantization with it [4]."""
        places = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS * 2 - 1
        codebook = centroids(places, self.weight, 2**bits)
        nearest = codebook[torch.searchsorted(edges(codebook), places)]
        moments: list[Tensor] = []
        for x in (places, nearest):
            mean = (self.count * x).sum() / self.count.sum()
            moments += [mean, (self.count * (x - mean).square()).sum().div(self.count.sum()).sqrt()]
        return codebook.float(), torch.stack(moments).float()


def _stack(nested: Any) -> Tensor:
    return nested if isinstance(nested, Tensor) else torch.stack([_stack(item) for item in nested])
