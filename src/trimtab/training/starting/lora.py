"""Adapters as a recipe asks for them, and what a run with adapters leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.models.lora import Adapters, LoraSettings, save_adapters
from trimtab.models.save import save
from trimtab.models.transformer import Model
from trimtab.registry import build_dataclass


def apply(model: Model, settings: Mapping[str, Any], where: str = "'lora' in the recipe") -> Adapters:
    """Put adapters on `model` by a recipe's `lora: {rank, alpha, targets, ...}`; see `LoraSettings`.

    Only they are trained from then on. Raises ConfigError for settings or targets that do not fit.
    """
    return Adapters(model, build_dataclass(LoraSettings, settings, where=where))


def exporter(adapters: Adapters, dtype: str, made: Mapping[str, Any]) -> Callable[[Model, Path], None]:
    """What writes a run's result: the adapter to `adapter/` beside the model's folder, and the merged model.

    `made` says what the adapter was trained on. The model is then an ordinary one, in `dtype`.
    """

    def export(model: Model, folder: Path) -> None:
        save_adapters(adapters, folder.parent / "adapter", made, overwrite=True)
        save(adapters.fold().to(getattr(torch, dtype)), folder, overwrite=True)

    return export
