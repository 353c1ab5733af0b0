"""KVQuant: codebooks where the loss is sensitive, keys before rotary embedding, outliers as they are.

Hooper et al., KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization, 2024,
arXiv 2401.18079.

Keys are coded per channel, between thresholds fixed by calibration (an attachment, `trimtab attach kvquant`),
and before rotary embedding, which mixes channels; they are turned when they are read. Values are coded per
token, between the token's own percentiles. A code is a place in a codebook of the layer, one for keys and one
for values, from Fisher-weighted k-means. What lies beyond thresholds or percentiles is kept as it is in a
sparse list. Q-Norm stretches the codebooks so that mean and deviation are those before quantization. The
first `sinks` tokens stay in full.

As published, with these choices. The list of outlying keys has room for `headroom` times the expected number
in every 16 tokens (more where sizes are rounded up), so that memory is known beforehand; later ones of the
same 16 tokens are clamped. `outlier_rate` tells how many were listed and clamped, since static thresholds
drift on text unlike the calibration's. A percentile of
few channels leaves at least one value a side, so values have more outliers than `outliers` says where a layer
has few (2 of 128). Outliers have no part in a token's range, so the published median in their place is not
needed. Every token is coded when it is committed; the prompt is attended in full and coded at its end.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.attachment import Attachment
from trimtab.errors import ConfigError
from trimtab.kernels.nuq import NuqCodec, outliers_per_side
from trimtab.kernels.paged import PAGE
from trimtab.kvcache.base import Sequence, StepRows
from trimtab.kvcache.paging.per_layer import PerLayerCache, PerLayerRows, PerLayerSequence
from trimtab.registry import KV_CACHES, Card

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan

log = logging.getLogger("trimtab.kvcache")
_WIDEST = 32767  # channels of a layer: places in a list are 16 bits


@dataclass(frozen=True, slots=True)
class KVQuantOptions:
    bits: Literal[2, 3, 4, 16] = field(
        default=3, metadata={"help": "bits a number; 16 = keep all in full", "label": True}
    )
    outliers: float = field(
        default=0.01, metadata={"help": "share kept exactly: what the attachment is for, or 0 for none"}
    )
    headroom: float = field(
        default=1.25, metadata={"help": "least room for outlying keys, in multiples of their expected number"}
    )
    sinks: int = field(default=1, metadata={"help": "first tokens, 0 to 5, kept in full"})
    nuq: bool = field(default=True, metadata={"help": "fitted codebooks; false = evenly spaced codes"})
    q_norm: bool | None = field(
        default=None, metadata={"help": "keep mean and deviation of a layer's values; none = at 2 bits only"}
    )
    pre_rope: bool = field(default=True, metadata={"help": "false: keys after rotary embedding (ablation)"})
    attachment: str = field(default="auto", metadata={"help": "its folder; auto = beside the model"})

    def __post_init__(self) -> None:
        if not 0 <= self.sinks <= 5:
            raise ConfigError(f"option 'sinks' of kvquant is {self.sinks}; it must be 0 to 5")
        if not 1 <= self.headroom <= 10:
            raise ConfigError(f"option 'headroom' of kvquant is {self.headroom}; it must be 1 to 10")
        if self.q_norm and not self.nuq:
            raise ConfigError("kvquant with q_norm=true needs nuq=true: it was fitted for those codebooks")


@KV_CACHES.add(
    options=KVQuantOptions,
    card=Card(
        title="KVQuant",
        idea="Code keys per channel and values per token with fitted codebooks; keep 1% of outliers exactly.",
        exactness="As published, with room for outlying keys bounded; lossy, bits=16 is lossless. On 128 "
        "channels of 16-bit numbers, 3 bits with outliers are 3.75 effective bits.",
        cost="bits / 16 of the bytes, 4 bytes an outlier, 4 a token for its range; `sinks` tokens in full; "
        "the prompt is held in full until its end; every key is turned again at every step.",
        needs="An attachment fitted for the model (`trimtab attach kvquant`); a model without a sliding "
        "window of its own and without dynamic rope scaling.",
        avoid_when="Texts are unlike those of the calibration, or rows are to be dropped head by head.",
        paper="Hooper et al., KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache "
        "Quantization, 2024",
        arxiv="2401.18079",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: 3 bits: 1.5 "
        "MiB held (full 6.0), perplexity +1.9%, needle 30% (40%), 0.42x the speed of full.",
    ),
)
class KVQuant(PerLayerCache):
    options: KVQuantOptions

    @staticmethod
    def problems(options: KVQuantOptions, plan: Plan, config: ModelConfig) -> list[str]:
        found = KVQuant.model_problems(config)
        width = config.num_kv_heads * config.head_dim
        if options.bits < 16 and (width > _WIDEST or config.head_dim % PAGE):
            found.append(
                f"the model has {config.num_kv_heads} KV heads of {config.head_dim}; kvquant codes at most "
                f"{_WIDEST} channels a layer, and head sizes that are multiples of {PAGE}"
            )
        return found

    def make_rows(self, memory_bytes: int) -> PerLayerRows:
        coded = self.options.bits < 16
        return PerLayerRows(
            self.shape,
            memory_bytes,
            self._codec() if coded else None,
            kept_most=self.options.sinks if coded else 0,
            rope_on_read=self.options.pre_rope,
        )

    def _codec(self) -> NuqCodec:
        o, s = self.options, self.shape
        fitted = s.attachments.get("kvquant", o.attachment)
        share = fitted.options.get("outliers")
        if o.outliers not in (0, share):
            raise ConfigError(
                f"option 'outliers' of kvquant is {o.outliers}, but the attachment {fitted.path} is for "
                f"{share}; give outliers={share} or 0, or make another with --option outliers={o.outliers}"
            )
        part, layers, width = int(o.outliers > 0), s.num_layers, s.num_kv_heads * s.head_dim
        ranges = fitted.tensor("k_range", (2, 2, layers, 2, width), torch.float32)
        return NuqCodec.make(
            s.dtype,
            ranges[int(not o.pre_rope), part],
            self._books(fitted, "k", (2, 2), (int(not o.pre_rope), part)),
            self._books(fitted, "v", (2,), (part,)),
            k_share=o.outliers * o.headroom,
            v_side=outliers_per_side(o.outliers, width),
        )

    def _books(
        self, fitted: Attachment, what: str, axes: tuple[int, ...], which: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Codebooks [L, 2^bits] to code with and to decode with."""
        o, layers, size = self.options, self.shape.num_layers, 2**self.options.bits
        if not o.nuq:
            uniform = torch.linspace(-1, 1, size).expand(layers, size)
            return uniform, uniform
        book = fitted.tensor(f"{what}_codebook_{o.bits}", (*axes, layers, size), torch.float32)[which]
        if not (o.bits == 2 if o.q_norm is None else o.q_norm):
            return book, book
        moments = fitted.tensor(f"{what}_moments_{o.bits}", (*axes, layers, 4), torch.float32)[which]
        mean, deviation, new_mean, new_deviation = moments[..., None].unbind(1)
        stretch = deviation / new_deviation
        return book, book * stretch + mean - new_mean * stretch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        if not self.options.pre_rope:
            self.shape.kernels.rotate(k, rows.cos, rows.sin)
        return super().attend(layer, q, k, v, rows)

    def kept(self, sequence: PerLayerSequence, first: int) -> list[list[int]] | None:
        tokens = list(range(first, min(self.options.sinks, sequence.length)))
        return [tokens] * self.shape.num_layers if tokens else None

    def outlier_rate(self, sequence: Sequence) -> tuple[float, float]:
        """The share of a text's coded keys that are kept exactly, and that had no room and are clamped."""
        coded, listed, clamped = self._count(sequence)
        return (listed / coded, clamped / coded) if coded else (0.0, 0.0)

    def _count(self, sequence: Sequence) -> tuple[int, int, int]:
        """Keys coded, kept exactly, clamped."""
        t, slot = self.rows.tables, sequence.slot
        done = int(t.done[slot])
        if t.codec is None or done <= self.options.sinks:
            return 0, 0, 0
        assert isinstance(t.codec, NuqCodec)
        units = t.arena.view(-1, t.num_layers, t.codec.k_unit + t.codec.v_unit)
        blocks = t.coded[slot, : -(-done // PAGE)].long().to(units.device)
        listed, clamped = t.codec.listed(units[blocks, :, : t.codec.k_unit].flatten(0, 1))
        return (done - self.options.sinks) * t.num_layers * t.width, listed, clamped

    def release(self, sequence: Sequence) -> None:
        told = self.options.outliers and log.isEnabledFor(logging.INFO)
        coded, listed, clamped = self._count(sequence) if told else (0, 0, 0)
        if coded:
            log.info(
                "kvquant: of a text's keys %.2f%% lay beyond their thresholds, which were fitted for %.2f%%; "
                "%.2f%% had no room and were clamped",
                100 * (listed + clamped) / coded,
                100 * self.options.outliers,
                100 * clamped / coded,
            )
        super().release(sequence)
