"""KV-cache bytes per request, as metered by the engine, and what they mean per stored number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.evaluation.statistics import mean
from trimtab.evaluation.tasks.base import Metric

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig


def kv_numbers_per_token(config: ModelConfig) -> int:
    """How many numbers a cache that forgets nothing keeps of one token: keys and values of all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim


def host_metrics(host: Sequence[int], fetched: int, tokens: int) -> dict[str, Metric]:
    """Bytes each request held in host memory besides, and those `fetched` from there for `tokens` tokens;
    nothing where no host memory is used."""
    if not any(host):
        return {}
    return {
        "kv_bytes_host": Metric(mean(host), "B", "lower", n=len(host), label="KV in host memory"),
        "kv_bytes_fetched": Metric(fetched / tokens, "B", "lower", n=tokens, label="fetched a token"),
    }


def held_metrics(config: ModelConfig, tokens: Sequence[int], held: Sequence[int]) -> dict[str, Metric]:
    """Metrics from the peak bytes each request `held` while it had `tokens` tokens.

    `kv_bits` is bytes held over the numbers a full cache would keep of the same tokens: 16 for a full
    cache of 16-bit numbers, less when codes are shorter or tokens are dropped; scales, residual windows,
    indices and the unused end of the last page count.
    """
    numbers = kv_numbers_per_token(config)
    bits = [8 * h / (t * numbers) for t, h in zip(tokens, held, strict=True)]
    title = f"KV bytes held per request of {mean(tokens):.0f} tokens"
    return {
        "kv_bytes_held": Metric(
            mean(held), "B", "lower", n=len(held), label="KV held", title=title, axis="bytes"
        ),
        "kv_bits": Metric(mean(bits), "bit", "lower", n=len(held), label="bits / number"),
        "kv_tokens": Metric(mean(tokens), "tokens", n=len(tokens)),
    }
