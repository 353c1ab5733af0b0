"""Plain causal attention over a padded batch: what training and the oracles use."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.errors import RequestError
from trimtab.models.config import ModelConfig
from trimtab.models.rotary import Rotary, rotate


class CausalAttend:
    """An `attend` for one batch of whole texts `[B, T]`, rows flattened text by text.

    `positions[B * T]` count a text's own tokens from 0, padding left out.
    """

    def __init__(
        self,
        config: ModelConfig,
        rotary: Rotary,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise RequestError(
                f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; it must be "
                "integers of shape [texts, tokens]"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise RequestError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )
        self.shape = input_ids.shape
        self.windows = config.sliding_windows
        self.shared_heads = config.num_heads != config.num_kv_heads
        steps = input_ids.shape[1]
        device = input_ids.device
        self._kept = None if attention_mask is None else attention_mask.to(device).bool()
        if self._kept is None:
            positions = torch.arange(steps, device=device).expand(self.shape)
        else:
            positions = (self._kept.long().cumsum(-1) - 1).clamp(min=0)
        self.positions = positions.flatten()
        self._cos_sin = rotary.cos_sin(self.positions, length=steps)
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q `[B * T, H, d]`, k and v `[B * T, G, d]` to `[B * T, H, d]`."""
        cos, sin = self._cos_sin
        q, k, v = (
            x.unflatten(0, self.shape).transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)
        )
        mask = self._mask(self.windows[layer])
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.shared_heads
        )
        return out.transpose(1, 2).flatten(0, 1)

    def _mask(self, window: int | None) -> torch.Tensor | None:
        """True where a query (row) sees a key (column), `[B or 1, 1, T, T]`; None is plain causal."""
        steps = self.shape[1]
        if window is not None and window >= steps:
            window = None
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int | None) -> torch.Tensor | None:
        if window is None and self._kept is None:
            return None
        index = torch.arange(self.shape[1], device=self.positions.device)
        distance = index[:, None] - index[None, :]
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        seen = seen[None, None]
        if self._kept is not None:
            # Padding sees itself, so that its softmax is over something and no NaN arises.
            seen = (seen & self._kept[:, None, None, :]) | (distance == 0)
        return seen
