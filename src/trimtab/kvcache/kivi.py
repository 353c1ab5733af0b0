"""KIVI: keys quantized per channel, values per token, the latest tokens kept in full.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024, arXiv 2402.02750.

Keys have channels of outlying size, so a group that shares scale and zero is `group_size` tokens of one
channel; values have not, so a group is `group_size` channels of one token. The prompt is attended in full
precision and packed when it is complete. From then on full keys are packed `residual` at a time (their
number breathes between 0 and residual - 1); of the values always the last `residual` are in full.

Exact as published (asymmetric min-max, keys after rotary embedding), with grouped-query attention added.
Group size 32 and residual 128 are the usual settings (reconstructed: the release leaves them to the caller).
Stored rows are never quantized twice. A chunk that was packed cannot be rolled back, so only committed rows
are packed. Attention reads the codes; `bits=16` packs nothing and equals `full`.

Deviation on request: with `prefill=512` the prompt is packed as it comes, after every 512 tokens of the
text, so that its peak falls; later tokens of the prompt then attend to packed ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.errors import ConfigError
from trimtab.kvcache.base import KVShape
from trimtab.kvcache.paging.coded import CodedRows, Coding, coding_problems
from trimtab.kvcache.paging.heads import HeadRows
from trimtab.kvcache.paging.row_policy import RowPolicy
from trimtab.registry import KV_CACHES, Card

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan


@dataclass(frozen=True, slots=True)
class KiviOptions:
    bits: Literal[2, 3, 4, 8, 16] = field(
        default=2, metadata={"help": "bits a number; 16 = keep all in full", "label": True}
    )
    group_size: int = field(default=32, metadata={"help": "numbers that share a scale and a zero"})
    residual: int = field(default=128, metadata={"help": "latest tokens kept in full"})
    prefill: int | Literal["whole"] = field(
        default="whole", metadata={"help": "pack the prompt after every so many tokens, or as a whole"}
    )

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ConfigError(f"option 'group_size' of kivi is {self.group_size}; it must be at least 1")
        if self.residual < self.group_size or self.residual % self.group_size:
            raise ConfigError(
                f"option 'residual' of kivi is {self.residual}; it must be a multiple of group_size "
                f"({self.group_size})"
            )
        if self.prefill != "whole" and self.prefill < 1:
            raise ConfigError(
                f"option 'prefill' of kivi is {self.prefill}; it must be 'whole' or a number of tokens"
            )


@KV_CACHES.add(
    options=KiviOptions,
    card=Card(
        title="KIVI",
        idea="Pack old keys per channel and old values per token into 2 to 8 bits; keep the latest in full.",
        exactness="As published, plus grouped-query attention. Lossy; bits=16 is lossless. With two 16-bit "
        "constants a group, 2 bits and groups of 32 are 3 effective bits.",
        cost="(bits + 32 / group_size) / 16 of the bytes for old tokens, all of them for the latest "
        "`residual`; the prompt is held in full until its end unless `prefill` is a number.",
        needs="group_size divides the head size and residual; a model without a sliding window of its own.",
        avoid_when="Contexts are shorter than a few times the residual, or the cache is small anyway.",
        paper="Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024",
        arxiv="2402.02750",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: 2 bits: 1.5 "
        "MiB held (full 6.0), perplexity +1.9%, needle 40% (40%), 0.97x the speed of full; 4 "
        "bits: 2.2 MiB, +0.05%, 0.75x.",
    ),
)
class Kivi(RowPolicy):
    stage = "store"
    single_rows: ClassVar[bool] = False
    not_single_because = "kivi packs keys in groups of tokens that share a scale, so none can go alone"

    @staticmethod
    def problems(options: KiviOptions, plan: Plan, config: ModelConfig) -> list[str]:
        return coding_problems("kivi", options.bits, options.group_size, config)

    @staticmethod
    def packs(options: KiviOptions) -> Literal["", "at the end", "as it comes"]:
        if options.bits == 16:
            return ""
        return "at the end" if options.prefill == "whole" else "as it comes"

    @classmethod
    def make_rows(cls, shape: KVShape, options: KiviOptions, memory_bytes: int, notes_bytes: int) -> HeadRows:
        if options.bits == 16:
            return super().make_rows(shape, options, memory_bytes, notes_bytes)
        coding = Coding(
            options.bits,
            options.group_size,
            by_token=False,
            keep_values=options.residual,
            step=options.residual,
            chunk=0 if options.prefill == "whole" else options.prefill,
        )
        return CodedRows(shape, memory_bytes, notes_bytes, coding)
