"""Attention over packed segments: many texts in one row of tokens, none of them sees another.

This is what training runs. Texts are laid end to end without padding; each is a segment with positions
from 0, and attention is exactly block-diagonal, so a packed text gets the numbers it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.kernels.training.attention import packed_attention
from trimtab.models.config import ModelConfig
from trimtab.models.rotary import Rotary


class PackedAttend:
    """An `attend` for segments of the given lengths; N is the sum of `lengths`.

    Attributes:
        positions: `[N]`, counted from 0 in every segment.
        bounds: int64 `[S + 1]` on the CPU, where segments begin and end.

    `causal=False` lets every token see its whole segment (label-supervised fine-tuning without the mask).
    """

    def __init__(
        self,
        config: ModelConfig,
        rotary: Rotary,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        causal: bool = True,
    ) -> None:
        self.windows = config.sliding_windows
        self.causal = causal
        self.bounds = torch.tensor([0, *lengths]).cumsum(0)
        spans = torch.tensor(list(lengths))
        starts = self.bounds[:-1].repeat_interleave(spans)
        self.positions = (torch.arange(int(self.bounds[-1])) - starts).to(device)
        of_row = spans.repeat_interleave(spans).to(device) if rotary.length_dependent else None
        self._cos, self._sin = rotary.cos_sin(self.positions, length=of_row)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q `[N, H, d]`, k and v `[N, G, d]` to `[N, H, d]`."""
        return packed_attention(
            q, k, v, self._cos, self._sin, self.bounds, causal=self.causal, window=self.windows[layer]
        )
