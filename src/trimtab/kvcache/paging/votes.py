"""What the latest queries of a text look at: the votes by which its rows are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kvcache.base import Sequence
from trimtab.kvcache.paging.heads import HeadRows


def remember(queries: Tensor, sequence: Sequence, new: Tensor) -> None:
    """Put those of the sequence's next queries `new` [L, n, H, d] that are among its prompt's last into
    `queries` float32 [L, window, H, d]."""
    first = sequence.prompt_length - queries.shape[1]
    new = new[:, max(0, first - sequence.length) :]
    at = max(0, sequence.length - first)
    queries[:, at : at + new.shape[1]] = new


def votes(rows: HeadRows, slot: int, queries: Tensor) -> Tensor:
    """Attention that each row of a text receives from its latest queries [L, window, H, d], float32
    [L, G, rows of the longest head] on the CPU."""
    shape, window = rows.shape, queries.shape[1]
    span = torch.tensor([[slot, 0, window]], dtype=torch.int32)
    start = rows.length.clone()
    start[slot] -= window
    longest = int(rows.length[slot].max())
    sums = torch.zeros(shape.num_layers, 1, shape.num_kv_heads, longest, device=shape.device)
    for layer in range(shape.num_layers):
        rows.column_sums(layer, queries[layer], span, sums[layer], start=start)
    return sums[:, 0].cpu()
