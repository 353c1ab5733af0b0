"""The host tier: a second bounded arena, in the CPU's memory, for what is fetched row by row when needed.

On a GPU the memory is pinned. On a CPU both tiers are the same kind of memory, and what crosses between
them is counted as if it were not.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.kvcache.base import KVShape, Sequence, StepRows
from trimtab.kvcache.paging.arena import Arena
from trimtab.sizes import parse_bytes

CPU = torch.device("cpu")
HOST_MEMORY_HELP = "bound of the host memory, e.g. 4GiB; default: all contexts, at most 1/4 of what is free"


def check_host_memory(value: str | None, method: str) -> None:
    """ConfigError unless `value` is a size or None."""
    if value is not None:
        parse_bytes(value, f"option 'host_memory' of {method}")


def host_arena(
    shape: KVShape, page_sizes: list[int], row_bytes: int, option: str | None, method: str
) -> Arena:
    """`option` bytes in pages of `page_sizes`; None: what rows of `row_bytes` a head need for all contexts,
    but at most a quarter of the memory that is free now."""
    page_bytes = max(page_sizes)
    if option is None:
        rows = shape.max_sequences * (shape.max_length + shape.max_step_tokens)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        wanted = rows * shape.num_layers * shape.num_kv_heads * row_bytes
        total = min(wanted, max(free // 4, 64 * page_bytes))
    else:
        total = parse_bytes(option)
    slab = page_bytes * min(64, total // page_bytes // 64)
    setting = f"option 'host_memory' of {method}"
    pinned = shape.device.type == "cuda"
    return Arena(total, page_sizes, CPU, min_slab=slab, setting=setting, pinned=pinned)


def some_spans(rows: StepRows, wanted: Callable[[Sequence], bool]) -> tuple[Tensor, Tensor | None]:
    """Spans int32 [n, 3] of the sequences `wanted`, and the mask among their new rows."""
    which = [i for i, sequence in enumerate(rows.sequences) if wanted(sequence)]
    if len(which) == len(rows.sequences):
        return rows.spans, rows.mask
    spans = rows.spans[which]
    if rows.mask is None or not which:
        return spans, None
    squares = rows.mask.split([(end - begin) ** 2 for begin, end in rows.bounds])
    return spans, torch.cat([squares[i] for i in which])
