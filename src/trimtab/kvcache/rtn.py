"""Round to nearest: keys and values quantized token by token as soon as they are committed.

No paper: the baseline that papers on KV quantization call RTN, and what every one of them must beat. A group
that shares scale and zero is `group_size` neighbouring channels of one token's one head, in K (after rotary
embedding) as in V; min-max, asymmetric, no calibration, no outliers kept. Groups of 32 are a choice of ours,
so that it spends the same bits as `kivi` (KIVI's and FlexGen's per-token baselines use 32 and 64).

The prompt is attended in full and packed when it is complete, each later token after its own step; a
`residual` of latest tokens may be kept in full. With `prefill=512` the prompt is packed as it comes, after
every 512 tokens of the text. A token's codes are its own, so single rows can be dropped; `bits=16` packs
nothing and equals `full`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

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
class RtnOptions:
    bits: Literal[2, 3, 4, 8, 16] = field(
        default=4, metadata={"help": "bits a number; 16 = keep all in full", "label": True}
    )
    group_size: int = field(default=32, metadata={"help": "channels that share a scale and a zero"})
    residual: int = field(default=0, metadata={"help": "latest tokens kept in full"})
    prefill: int | Literal["whole"] = field(
        default="whole", metadata={"help": "pack the prompt after every so many tokens, or as a whole"}
    )

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ConfigError(f"option 'group_size' of rtn is {self.group_size}; it must be at least 1")
        if self.residual < 0:
            raise ConfigError(f"option 'residual' of rtn is {self.residual}; it must not be negative")
        if self.prefill != "whole" and self.prefill < 1:
            raise ConfigError(
                f"option 'prefill' of rtn is {self.prefill}; it must be 'whole' or a number of tokens"
            )


@KV_CACHES.add(
    options=RtnOptions,
    card=Card(
        title="Round to nearest",
        idea="Pack every key and value token by token into a few bits: the baseline of KV quantization.",
        exactness="Min-max rounding of each token's groups of channels, nothing else. Lossy; bits=16 is "
        "lossless.",
        cost="(bits + 32 / group_size) / 16 of the bytes; the prompt is held in full until its end unless "
        "`prefill` is a number.",
        needs="group_size divides the head size; a model without a sliding window of its own.",
        avoid_when="Keys have channels of outlying size, as most models' have: kivi holds as many bytes.",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: 4 bits: 1.9 "
        "MiB held (full 6.0), perplexity +0.04%, 0.80x the speed of full; 2 bits: 1.2 MiB, +12%.",
    ),
)
class RoundToNearest(RowPolicy):
    stage = "store"

    @staticmethod
    def problems(options: RtnOptions, plan: Plan, config: ModelConfig) -> list[str]:
        found = coding_problems("rtn", options.bits, options.group_size, config)
        for choice in plan.cache.all:
            if options.residual and KV_CACHES.get(choice.name).cls.drops_settled(choice.options):
                found.append(
                    f"{choice.name} moves single packed rows, and rtn:residual={options.residual} keeps the "
                    "latest in full; use residual=0"
                )
        return found

    @staticmethod
    def packs(options: RtnOptions) -> Literal["", "at the end", "as it comes"]:
        if options.bits == 16:
            return ""
        return "at the end" if options.prefill == "whole" else "as it comes"

    @classmethod
    def make_rows(cls, shape: KVShape, options: RtnOptions, memory_bytes: int, notes_bytes: int) -> HeadRows:
        if options.bits == 16:
            return super().make_rows(shape, options, memory_bytes, notes_bytes)
        coding = Coding(
            options.bits,
            options.group_size,
            by_token=True,
            keep=options.residual,
            keep_values=options.residual,
            chunk=0 if options.prefill == "whole" else options.prefill,
        )
        return CodedRows(shape, memory_bytes, notes_bytes, coding)
