"""KCache: keys on the device, values in host memory; a step fetches those of the most attended tokens alone.

He & Wu, Efficient LLM Inference with KCache, 2024, arXiv 2404.18057.

The prompt is attended exactly. When it is complete its values move to the host. From then on every query
head takes the softmax over *all* keys, and only the values of its `n` largest probabilities take part in the
sum: o = sum of p_i v_i over them. A group's heads fetch the union of their rows, so that a row crosses the
bus once. New keys go to the device, new values to the host. Under `kivi` or `rtn` values are packed in host
memory, and cross as they lie there.

As published; top-n after the softmax, no renormalization and no exempt layers by default are reconstructed,
and the union over a group is ours. `n` that reaches all tokens equals full attention. What was left out is
less than the dropped probability times the largest value. The rows fetched live for one layer's attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError
from trimtab.kernels.paged import PAGE
from trimtab.kvcache.paging.coded import CodedRows
from trimtab.kvcache.paging.far_coded import FarCodedRows
from trimtab.kvcache.paging.far_values import FarValues
from trimtab.kvcache.paging.heads import HeadRows
from trimtab.kvcache.paging.host import HOST_MEMORY_HELP, check_host_memory, host_arena
from trimtab.kvcache.paging.per_head import PerHeadRows
from trimtab.kvcache.paging.row_policy import RowPolicy
from trimtab.registry import KV_CACHES, Card

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.plan import Plan


@dataclass(frozen=True, slots=True)
class KCacheOptions:
    n: int = field(default=64, metadata={"help": "values fetched for a query head and token", "label": True})
    renormalize: bool = field(
        default=False, metadata={"help": "make the chosen probabilities sum to one (not in the paper)"}
    )
    full_layers: int = field(
        default=0, metadata={"help": "first layers that keep their values on the device and use them all"}
    )
    host_memory: str | None = field(default=None, metadata={"help": HOST_MEMORY_HELP})

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"option 'n' of kcache is {self.n}; it must be at least 1")
        if self.full_layers < 0:
            raise ConfigError(f"option 'full_layers' of kcache is {self.full_layers}; it must be 0 or more")
        check_host_memory(self.host_memory, "kcache")


@KV_CACHES.add(
    options=KCacheOptions,
    card=Card(
        title="KCache",
        idea="Keep keys on the device and values in host memory; fetch the values of the most attended "
        "tokens alone.",
        exactness="As published; top-n after the softmax is reconstructed, one fetch for a group's heads "
        "ours. Lossy, but no more than the dropped probability; n = all tokens is lossless.",
        cost="Half the bytes on the device, the other half in host memory; each step moves up to n rows of "
        "values a query head over the bus, packed under kivi or rtn. The prompt is on the device in full "
        "until its end.",
        needs="A model without a sliding window of its own; host memory for all values.",
        avoid_when="There is no second memory, or a step's time counts more than the batch that fits: the "
        "fetch pays off where n / length is below bus bandwidth / device bandwidth.",
        paper="He & Wu, Efficient LLM Inference with KCache, 2024",
        arxiv="2404.18057",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: n=64: 3.0 MiB"
        " held and 3.0 in host memory (full 6.0), perplexity +58%, needle 40% (40%), 0.25x the "
        "speed of full.",
    ),
)
class KCache(RowPolicy):
    stage = "place"

    @staticmethod
    def problems(options: KCacheOptions, plan: Plan, config: ModelConfig) -> list[str]:
        found = []
        if any(config.sliding_windows):
            found.append("the model's own sliding-window layers already forget; use cache=full")
        if options.full_layers >= config.num_layers:
            found.append(
                f"full_layers is {options.full_layers} and the model has {config.num_layers} layers, so no "
                "values would be in host memory; give fewer"
            )
        for choice in plan.cache.all:
            if options.full_layers and KV_CACHES.get(choice.name).cls.packs(choice.options):
                found.append(
                    f"kcache:full_layers={options.full_layers} keeps those layers' values in full, and "
                    f"{choice.name} packs all layers; use full_layers=0"
                )
        return found

    @classmethod
    def place_rows(cls, rows: HeadRows, options: KCacheOptions) -> HeadRows:
        row_bytes = rows.shape.row_bytes // 2
        sizes = [PAGE * row_bytes]
        if isinstance(rows, CodedRows):
            sizes.append(rows.coded_value_bytes)
        host = host_arena(rows.shape, sizes, sum(sizes) // PAGE, options.host_memory, "kcache")
        if isinstance(rows, CodedRows):
            return FarCodedRows(rows, host, options.n, options.renormalize)
        assert isinstance(rows, PerHeadRows)
        return FarValues(rows, host, options.n, options.renormalize, options.full_layers)
