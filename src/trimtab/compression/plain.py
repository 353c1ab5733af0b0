"""The matrices as they are, in the model's type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.compression.base import WeightMethod
from trimtab.registry import WEIGHTS, Card, NoOptions

if TYPE_CHECKING:
    from trimtab.models.transformer import Model


@WEIGHTS.add(
    card=Card(
        title="Plain weights",
        idea="Keep every matrix as the checkpoint has it, in the plan's dtype.",
        exactness="Exact, up to the rounding of a dtype other than the stored one.",
        cost="Parameters x bytes per number, all of it read for every step.",
        needs="Nothing.",
        avoid_when="Reading the weights is what bounds the speed, or they do not fit.",
    )
)
class Plain(WeightMethod):
    @staticmethod
    def convert(model: Model, options: NoOptions) -> Model:
        return model
