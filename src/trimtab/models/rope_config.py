"""The rotary embedding's settings, from either style of `config.json`.

Older files have `rope_theta` and `rope_scaling`; newer ones a single `rope_parameters`. What each kind of
scaling reads is a row of `_KINDS`; a setting it would not read is refused, since someone meant something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import CheckpointError, did_you_mean
from trimtab.models.fields import Fields

_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
# `finetuned` is a remark that the first YaRN checkpoints carry.
_COMMON = ("rope_theta", "rope_type", "type", "partial_rotary_factor", "finetuned")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become angles.

    `kind` is default, linear, dynamic, yarn or llama3. `max_positions` is the context length at which
    dynamic scaling starts; `original_max_positions` the one before stretching (yarn, llama3). The
    remaining fields belong to the kinds that name them and are None elsewhere.
    """

    kind: str
    theta: float
    max_positions: int
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def read_rope(fields: Fields, max_positions: int, head_dim: int, default_theta: float) -> RopeConfig:
    """The rotary settings in `fields`, both styles; raises CheckpointError for what is not implemented."""
    settings = _settings(fields)
    where = f"the rope settings of {fields.where}"
    if any(isinstance(value, dict) for value in settings.values()):
        raise CheckpointError(f"{where} differ by layer type, which trimtab does not implement")
    inner = Fields(settings, where)
    kind = inner.value("rope_type", settings.get("type") or "default")
    if settings.get("type") not in (None, kind):
        raise CheckpointError(f"{where} name two types, {kind!r} and {settings['type']!r}; keep one")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{where} use the type {kind!r}, which trimtab does not implement."
            f"{did_you_mean(str(kind), _KINDS)}"
        )
    for key in settings:
        if key not in _KINDS[kind] and key not in _COMMON:
            raise CheckpointError(f"{where} set {key!r}, which has no meaning for the type {kind!r}")
    inner.demand("partial_rotary_factor", (1,), 1)
    theta = inner.number("rope_theta", fields.number("rope_theta", default_theta, above=1.0), above=1.0)
    outer_original = fields.integer("original_max_position_embeddings", None)
    if kind == "dynamic" and head_dim < 4:
        raise fields.error("head_dim", head_dim, "at least 4 with dynamic rope scaling")
    if kind not in ("yarn", "llama3"):
        if outer_original is not None:
            raise CheckpointError(
                f"{fields.where} sets 'original_max_position_embeddings', which has no meaning for rope "
                f"of type {kind!r}"
            )
        factor = 1.0 if kind == "default" else inner.number("factor")
        return RopeConfig(kind, theta, max_positions, factor)
    original = outer_original or inner.integer("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        return RopeConfig(
            kind,
            theta,
            max_positions,
            inner.number("factor"),
            original,
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=_above_low(inner),
        )
    return RopeConfig(
        kind,
        theta,
        max_positions,
        inner.number("factor", max_positions / original),
        original,
        attention_factor=inner.number("attention_factor", None),
        # A zero asks for the default, as in the reference implementation.
        beta_fast=inner.number("beta_fast", 32.0, above=-1.0) or 32.0,
        beta_slow=inner.number("beta_slow", 1.0, above=-1.0) or 1.0,
        mscale=inner.number("mscale", None, above=-1.0),
        mscale_all_dim=inner.number("mscale_all_dim", None, above=-1.0),
        truncate=inner.flag("truncate", True),
    )


def _settings(fields: Fields) -> dict[str, Any]:
    found = {key: fields.value(key, None) for key in ("rope_scaling", "rope_parameters")}
    for key, value in found.items():
        if value is not None and not isinstance(value, dict):
            raise fields.error(key, value, "an object or null")
    old, new = found["rope_scaling"], found["rope_parameters"]
    if old and new and old != new:
        raise CheckpointError(
            f"{fields.where} has both 'rope_scaling' and 'rope_parameters', and they differ; keep one"
        )
    return dict(old or new or {})


def _above_low(inner: Fields) -> float:
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if high <= low:
        raise inner.error("high_freq_factor", high, f"above 'low_freq_factor' ({low:g})")
    return high
