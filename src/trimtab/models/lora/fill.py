"""Putting adapters on with given values, whatever kind of file those come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.models.lora.adapters import Adapters
from trimtab.models.lora.settings import LoraSettings

if TYPE_CHECKING:
    from trimtab.models.transformer import Model


def put_on(model: Model, settings: LoraSettings, tensors: Mapping[str, Tensor], where: str) -> Adapters:
    """Adapters with the values of `tensors`, which must be exactly theirs; else the model is as before."""
    adapters = Adapters(model, settings)
    parameters = adapters.named_parameters()
    try:
        for name in sorted(parameters.keys() | tensors.keys()):
            _check(name, parameters.get(name), tensors.get(name), where)
    except ConfigError:
        adapters.remove()
        raise
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return adapters


def _check(name: str, wanted: Tensor | None, found: Tensor | None, where: str) -> None:
    if wanted is None:
        raise ConfigError(f"the adapter {where} holds {name!r}, for which this model has no place")
    if found is None:
        raise ConfigError(f"the adapter {where} lacks {name!r}, which its targets call for")
    if found.shape != wanted.shape:
        raise ConfigError(
            f"the adapter {where} holds {name!r} of shape {list(found.shape)}; this model and its rank call "
            f"for {list(wanted.shape)}"
        )
    if not found.is_floating_point() or not bool(found.isfinite().all()):
        raise ConfigError(f"{name!r} of the adapter {where} holds values that are not numbers")
