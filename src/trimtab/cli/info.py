"""`trimtab info`: what a model is and what it needs, from its config alone."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from trimtab.cli import common

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}  # float16 is as large as bfloat16
INT8 = "int8"  # the matrices; the rest, and the cache, are bfloat16


def run(
    model: common.ModelArgument = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory to fit into, e.g. 16GiB. Default: what is free.", show_default=False
        ),
    ] = None,
    as_json: common.JsonOption = False,
) -> None:
    """Tell a model's architecture, size, KV-cache bytes per token, and what fits into memory.

    \b
    Examples:
      trimtab info
      trimtab info ./my-model --memory 16GiB
    """
    from trimtab.models.config import config_from_folder
    from trimtab.models.hub import find_folder
    from trimtab.sizes import parse_bytes

    folder = find_folder(model)
    room = free_memory() if memory is None else parse_bytes(memory, "--memory")
    facts = {"model": str(folder), **describe(config_from_folder(folder), room)}
    if as_json:
        common.write_json(facts)
    else:
        _show(facts)


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def describe(config: Any, memory: int | None) -> dict[str, Any]:
    """The facts about a model of `config`, and what fits into `memory` bytes with the full cache."""
    from trimtab.models import costs

    fits = {}
    for dtype, size in ITEM_BYTES.items():
        weights = costs.weight_bytes(config, size, int8=dtype == INT8)
        token = costs.kv_bytes_per_token(config, size)
        left = None if memory is None else memory - weights
        fits[dtype] = {
            "weight_bytes": weights,
            "kv_bytes_per_token": token,
            "kv_bytes_full_context": token * config.context_length,
            "tokens_that_fit": None if left is None else max(0, left // token),
            "full_contexts_that_fit": (
                None if left is None else max(0, left // (token * config.context_length))
            ),
        }
    windows = sorted({window for window in config.sliding_windows if window is not None})
    return {
        "architecture": config.architecture,
        "parameters": costs.num_parameters(config),
        "parameters_per_token": costs.matmul_parameters(config, active_only=True),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "experts": None if config.moe is None else config.moe.num_experts,
        "experts_per_token": None if config.moe is None else config.moe.experts_per_token,
        "sliding_windows": windows,
        "vocabulary": config.vocab_size,
        "context": config.context_length,
        "memory_bytes": memory,
        "by_dtype": fits,
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from trimtab.sizes import format_bytes

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("model", escape(facts["model"]))
    table.add_row("architecture", escape(facts["architecture"]))
    table.add_row("parameters", f"{facts['parameters']:,}")
    shape = f"{facts['layers']} layers of width {facts['hidden_size']}, "
    shape += f"{facts['heads']} heads on {facts['kv_heads']} KV heads of {facts['head_dim']}"
    table.add_row("shape", shape)
    if facts["experts"]:
        table.add_row("experts", f"{facts['experts_per_token']} of {facts['experts']} for each token")
    if facts["sliding_windows"]:
        windows = ", ".join(f"{window:,}" for window in facts["sliding_windows"])
        table.add_row("sliding window", f"{windows} tokens")
    table.add_row("vocabulary", f"{facts['vocabulary']:,} tokens")
    table.add_row("context", f"{facts['context']:,} tokens")
    console = common.console()
    console.print(table)

    memory = facts["memory_bytes"]
    sizes = Table(box=None, padding=(0, 2, 0, 0))
    room = "memory unknown" if memory is None else f"fits in {format_bytes(memory)}"
    for heading in ("dtype", "weights", "KV per token", "KV of a full context", room):
        sizes.add_column(heading)
    for dtype, row in facts["by_dtype"].items():
        tokens, contexts = row["tokens_that_fit"], row["full_contexts_that_fit"]
        sizes.add_row(
            "bfloat16 weights=int8" if dtype == INT8 else dtype,
            format_bytes(row["weight_bytes"]),
            format_bytes(row["kv_bytes_per_token"]),
            format_bytes(row["kv_bytes_full_context"]),
            "" if tokens is None else f"{tokens:,} tokens, or {contexts:,} requests of full context",
        )
    console.print()
    console.print(sizes)
