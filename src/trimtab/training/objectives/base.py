"""What an objective is: a sum of losses over one micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from trimtab.errors import ConfigError
from trimtab.models.transformer import Model
from trimtab.training.data.batch import Batch


class Objective(ABC):
    """Minimised is the mean over all units of a step (tokens or texts), however they are split up.

    So an objective gives sums, and the loop divides by `units` of the whole step: accumulation, packing
    and several processes do not change what a token weighs.

    Attributes:
        options: the method's options dataclass.
        unit: what `units` counts: a `token` of text, which has bits per byte, or a whole `text`.
    """

    unit: Literal["token", "text"] = "token"

    def __init__(self, options: Any) -> None:
        self.options = options

    def source(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """A recipe's source as this objective wants it; ConfigError for one that it has no use for."""
        if spec.get("kind") == "labelled":
            raise ConfigError(
                "a source of kind 'labelled' has classes, which this objective leaves unused; set "
                "'objective: {name: classify, labels: [...]}', or read its texts as 'documents'"
            )
        return spec

    def extra_modules(self, model: Model) -> nn.Module | None:
        """Parameters beside the model's that are trained with it (a class head), or None."""
        return None

    def save_extra(self, folder: Path, model: Model) -> None:
        """Write those parameters into the folder of the trained `model`, as it was saved there."""

    @abstractmethod
    def units(self, batch: Batch) -> int:
        """What the loss of `batch` is summed over: trained tokens, or texts."""

    @abstractmethod
    def loss_sum(self, model: Model, batch: Batch) -> torch.Tensor:
        """The float32 sum of losses, with gradients."""

    def held_out_sums(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        """What is reported of held-out data, each as the mean over all units.

        `loss` is without terms that only steer the training; any other NAME is logged as `validation_NAME`.
        """
        return {"loss": self.loss_sum(model, batch)}
