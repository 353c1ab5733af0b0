"""Language modelling: the negative log-likelihood of each trained token, in nats.

Serves pretraining, continued pretraining and supervised fine-tuning alike: which tokens count is said by
the data (`Segment.trained`), as TRL's and others' completion masks do.
"""

from __future__ import annotations

import torch

from trimtab.kernels.training.cross_entropy import linear_cross_entropy
from trimtab.models.packed import PackedAttend
from trimtab.models.transformer import Model
from trimtab.training.data.batch import Batch
from trimtab.training.objectives.base import Objective


class LanguageModelling(Objective):
    def units(self, batch: Batch) -> int:
        return batch.trained_tokens

    def loss_sum(self, model: Model, batch: Batch) -> torch.Tensor:
        attend = PackedAttend(model.config, model.rotary, batch.lengths, batch.tokens.device)
        hidden = model.run(batch.tokens, attend.positions, attend)
        loss, _ = linear_cross_entropy(hidden, model.output_weight, batch.targets, batch.weights)
        return loss
