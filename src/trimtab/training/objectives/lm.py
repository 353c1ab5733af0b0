"""Language modelling: the negative log-likelihood of each trained token, in nats.

Serves pretraining, continued pretraining and supervised fine-tuning alike: which tokens count is said by
the data (`Segment.trained`), as TRL's and others' completion masks do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from trimtab.errors import ConfigError
from trimtab.kernels.training.cross_entropy import linear_cross_entropy
from trimtab.models.packed import PackedAttend
from trimtab.models.transformer import Model
from trimtab.registry import OBJECTIVES, Card
from trimtab.training.data.batch import Batch
from trimtab.training.objectives.base import Objective


@dataclass(frozen=True, slots=True)
class LMOptions:
    """Settings of `lm`.

    z_loss: weight of the squared log of the softmax's denominator, which keeps logits from drifting.
    """

    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.z_loss < math.inf:
            raise ConfigError(f"option 'z_loss' of objective 'lm' is {self.z_loss}; it must be 0 or more")


@OBJECTIVES.add(
    options=LMOptions,
    card=Card(
        title="Language modelling",
        idea="The negative log-likelihood of each trained token. Pretraining trains on all tokens, "
        "supervised fine-tuning on those of answers: the data says which.",
        exactness="Exact: every trained token of an optimiser step weighs the same, whatever the packing, "
        "accumulation or number of processes. The head's logits are formed a few rows at a time.",
        cost="One forward and one backward pass.",
        needs="Text, conversations or prompts with completions.",
        avoid_when="What is to be learnt is a class (see `classify`).",
    ),
)
class LanguageModelling(Objective):
    options: LMOptions

    def __init__(self, options: LMOptions | None = None) -> None:
        super().__init__(options or LMOptions())

    def units(self, batch: Batch) -> int:
        return batch.trained_tokens

    def loss_sum(self, model: Model, batch: Batch) -> torch.Tensor:
        return self._sum(model, batch, self.options.z_loss)

    def held_out_sums(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": self._sum(model, batch, 0.0)}

    def _sum(self, model: Model, batch: Batch, z_loss: float) -> torch.Tensor:
        attend = PackedAttend(model.config, model.rotary, batch.lengths, batch.tokens.device)
        hidden = model.run(batch.tokens, attend.positions, attend)
        loss, _ = linear_cross_entropy(hidden, model.output_weight, batch.targets, batch.weights, z_loss)
        return loss
