"""Rotary position embedding: angles from positions, in every scaling that the supported families use.

Frequencies are formed in float32, in the reference implementation's order of operations, because those
are the numbers the model was trained with. Angles are formed in float64: at position 10^6 a float32
product is off by several hundredths of a radian.
"""

from __future__ import annotations

import math

import torch

from trimtab.models.rope_config import RopeConfig


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) of `x[N, heads, d]` by its angle; `cos`, `sin` are `[N, d/2]`.

    Computed in float32, returned in the dtype of `x`.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Rotary:
    """The rotary embedding of one model.

    Attributes:
        inv_freq: `[d/2]` float32 on the CPU, radians a token; for dynamic scaling those of short texts.
        scale: what cosine and sine are multiplied by (yarn; 1 elsewhere).
    """

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.rope = rope
        self.head_dim = head_dim
        # A model is built on the meta device before its weights are mapped in; this table is real at once.
        with torch.device("cpu"):
            self.inv_freq, self.scale = _FREQUENCIES[rope.kind](rope, head_dim)
        self._by_device = {self.inv_freq.device: self.inv_freq}

    @property
    def length_dependent(self) -> bool:
        """True where the angles depend on how long the text is, so that cached rotated keys go stale."""
        return self.rope.kind == "dynamic"

    def cos_sin(
        self, positions: torch.Tensor, length: int | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine tables, each float32 `[N, d/2]`, for `positions[N]`.

        `length` is the total length of the text: one number, or one for each row as `[N]`. Only dynamic
        scaling looks at it, and takes the largest position plus one where it is None.
        """
        inv_freq = self._frequencies(positions, length)
        angles = positions.to(torch.float64).unsqueeze(-1) * inv_freq.to(torch.float64)
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.float(), sin.float()

    def _frequencies(self, positions: torch.Tensor, length: int | torch.Tensor | None) -> torch.Tensor:
        """`[d/2]`, or `[N, d/2]` where rows have lengths of their own."""
        device = positions.device
        plain = self._by_device.get(device)
        if plain is None:
            plain = self._by_device[device] = self.inv_freq.to(device)
        if not self.length_dependent:
            return plain
        if length is None:
            length = positions.max() + 1
        lengths = torch.as_tensor(length, device=device).clamp(min=self.rope.max_positions)
        stretched = _dynamic_frequencies(self.rope, self.head_dim, lengths.unsqueeze(-1))
        return torch.where(lengths.unsqueeze(-1) > self.rope.max_positions, stretched, plain)


def _exponents(dim: int, device: torch.device | None = None) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _default(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    return 1.0 / (rope.theta ** _exponents(dim)), 1.0


def _linear(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    plain, scale = _default(rope, dim)
    return plain / rope.factor, scale


def _dynamic_frequencies(rope: RopeConfig, dim: int, lengths: torch.Tensor) -> torch.Tensor:
    """NTK-aware: a larger base for a longer text, so that the slowest pair covers it; `lengths[..., 1]`."""
    stretch = (rope.factor * lengths / rope.max_positions) - (rope.factor - 1)
    return 1.0 / ((rope.theta * stretch ** (dim / (dim - 2))) ** _exponents(dim, lengths.device))


def _yarn(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    """Fast pairs keep their frequency, slow ones are divided by the factor, with a ramp in between."""
    assert rope.original_max_positions is not None
    periods = rope.theta ** _exponents(dim)
    kept, divided = 1.0 / periods, 1.0 / (rope.factor * periods)

    def pair_with_turns(turns: float) -> float:
        """The index of the pair that makes `turns` full turns over the original context."""
        assert rope.original_max_positions is not None
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return divided * (1 - keep) + kept * keep, _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def grown(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)


def _llama3(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    """Long wavelengths are divided by the factor, short ones kept, those in between blended."""
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions
    assert low is not None and high is not None and original is not None
    plain, scale = _default(rope, dim)
    wavelength = 2 * math.pi / plain
    is_long, is_short = wavelength > original / low, wavelength < original / high
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    return torch.where(is_long, plain / rope.factor, torch.where(is_short, plain, blended)), scale


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "yarn": _yarn,
    "llama3": _llama3,
}
