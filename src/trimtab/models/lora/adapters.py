"""Adapters on a model: putting them on, switching them off, merging them into the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from trimtab.attachment import Base
from trimtab.errors import ConfigError, did_you_mean
from trimtab.models.lora.layer import LoraLinear
from trimtab.models.lora.settings import ALL_LINEAR, LoraSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.models.transformer import Model


class Adapters:
    """The adapters of one model; `add_lora` and `load_adapters` make them.

    While they are on, the model computes with them, in training as in `Model.run`, and only they are
    trained. Parameters keep their names; an adapted layer has two more, `lora_A` and `lora_B`.

    Attributes:
        base: the model as it was before, by its fingerprint.
        layers: the adapted layers by their names in the model.
    """

    def __init__(self, model: Model, settings: LoraSettings) -> None:
        if on(model):
            raise ConfigError("this model has adapters already; fold them in or remove them first")
        self.model, self.settings = model, settings
        found = _targets(model, settings.targets)
        self.base = Base.of(model)
        self._trained_before = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(settings.seed)
        self.layers = {name: LoraLinear(linear, settings, generator) for name, linear in found.items()}
        for name, layer in self.layers.items():
            _put(model, name, layer.train(model.training))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by its name in the model."""
        return {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in self.layers.items()
            for part in ("lora_A", "lora_B")
        }

    @property
    def merged(self) -> bool:
        """Whether the weights hold the updates."""
        return any(layer.merged for layer in self.layers.values())

    def merge(self) -> None:
        """Put the updates into the weights: as fast as the base, and no adapter is trained meanwhile.

        Sums are formed in float32 and rounded to the weights' type. The weights as they were are kept.
        """
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Take the updates out again; the weights are bit for bit what they were."""
        for layer in self.layers.values():
            layer.unmerge()

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Within, the model is the base model, bit for bit: the reference of preference training."""
        merged = [layer for layer in self.layers.values() if layer.merged]
        active = [layer for layer in self.layers.values() if layer.active]
        for layer in merged:
            layer.unmerge()
        for layer in active:
            layer.active = False
        try:
            yield
        finally:
            for layer in active:
                layer.active = True
            for layer in merged:
                layer.merge()

    def fold(self) -> Model:
        """Merge for good: the model is an ordinary one again, with other weights. These adapters end."""
        self.merge()
        return self._end()

    def remove(self) -> Model:
        """Take the adapters off: the model is the base again. These adapters end."""
        self.unmerge()
        return self._end()

    def _end(self) -> Model:
        for name, layer in self.layers.items():
            _put(self.model, name, layer.plain())
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained_before[name])
        self.layers = {}
        return self.model


def add_lora(
    model: Model,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | str = ALL_LINEAR,
    rslora: bool = False,
    seed: int = 0,
) -> Adapters:
    """Put low-rank adapters on `model`, which from then on trains nothing else; see `LoraSettings`.

    The model computes what it did until they are trained. Raises ConfigError for settings or targets that do
    not fit, before the model is changed.
    """
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    return Adapters(model, LoraSettings(rank, alpha, dropout, names, rslora, seed))


def on(model: nn.Module) -> bool:
    """Whether `model` has adapters beside its weights, merged or not."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def target_names(model: Model) -> list[str]:
    """The names of projections that can be adapted, experts' included and routers not."""
    return sorted({name.rpartition(".")[2] for name in _linears(model)})


def _linears(model: Model) -> dict[str, nn.Linear]:
    """Every projection within the layers, by its name.

    Not the routers of experts, whose small matrices gain nothing, nor the output head: its weight is used
    without the layer around it, and often it is the embedding table.
    """
    routers = {f"{name}.gate" for name, module in model.named_modules() if hasattr(module, "experts")}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.") and name not in routers
    }


def _targets(model: Model, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The projections that `names` stands for."""
    if names == (ALL_LINEAR,):
        return _linears(model)
    known = target_names(model)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, [*known, ALL_LINEAR])
            raise ConfigError(
                f"'targets' of the adapter names {name!r}, which this model cannot adapt.{hint}"
            )
    return {name: m for name, m in _linears(model).items() if name.rpartition(".")[2] in names}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
