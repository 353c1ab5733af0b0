"""Draws tokens in C++: decoding/processors.py tells what every setting means, and serves other devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from trimtab.kernels.native import Library

# One row: sample.h's Draw.
_DRAW = np.dtype(
    [
        ("logits", np.uint64),
        ("mask", np.uint64),
        ("u", np.float64),
        ("top_p", np.float64),
        ("temperature", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("token", np.int32),
        ("largest", np.float32),
    ],
    align=True,
)


@dataclass(slots=True)
class Wanted:
    """A row to draw from: logits float32 [V], allowed tokens (int32 words or None), the settings of
    `SamplingParams`, and the random number in [0, 1)."""

    logits: NDArray[np.float32]
    mask: NDArray[np.int32] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    u: float


def draw(library: Library, rows: Sequence[Wanted]) -> list[tuple[int, float]]:
    """For each row the token and its largest allowed logit; -1 where the logits are no numbers or all are
    forbidden."""
    table = np.array(
        [
            (
                row.logits.ctypes.data,
                0 if row.mask is None else row.mask.ctypes.data,
                row.u,
                row.top_p,
                min(row.temperature, 1e30),  # of a float32; this high all tokens are as likely
                row.min_p,
                min(max(row.top_k, 0), row.logits.size),
                -1,
                0.0,
            )
            for row in rows
        ],
        dtype=_DRAW,
    )
    library.lib.tt_sample(library.team, table.ctypes.data, len(rows), rows[0].logits.size)
    return list(zip(table["token"].tolist(), table["largest"].tolist(), strict=True))
