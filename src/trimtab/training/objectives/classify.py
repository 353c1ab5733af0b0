"""Label-supervised fine-tuning: cross entropy of a linear head on the pooled last-layer states of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from trimtab.errors import ConfigError
from trimtab.models.transformer import Model
from trimtab.registry import OBJECTIVES, Card
from trimtab.training.classifier import Classifier
from trimtab.training.data.batch import Batch
from trimtab.training.objectives.base import Objective


@dataclass(frozen=True, slots=True)
class ClassifyOptions:
    """Settings of `classify`.

    labels: names of the classes, in the order of the numbers in the data.
    pooling: what stands for a text: the state of its `last` token, or the `mean` or `max` over its tokens.
    causal: false lets every token see its whole text, as in LS-unLLaMA.
    seed: decides the head's starting values.
    """

    labels: tuple[str, ...]
    pooling: Literal["last", "max", "mean"] = "last"
    causal: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ConfigError(
                f"option 'labels' of objective 'classify' is {list(self.labels)}; name at least two classes, "
                "each once"
            )


@OBJECTIVES.add(
    options=ClassifyOptions,
    card=Card(
        title="LS-LLaMA",
        paper="Li et al., Label Supervised LLaMA Finetuning, 2023",
        arxiv="2310.01208",
        idea="A linear head on the pooled last-layer states of a text says its class; model (or adapter) and "
        "head learn it by cross entropy. Without the causal mask every token sees its whole text.",
        exactness="Equal to transformers' LlamaForSequenceClassification with the last token's state. Texts "
        "are packed without padding, so the last token is the text's own. The head is float32. The paper's "
        "classification of single tokens is not there.",
        cost="One forward and one backward pass; no logits over the vocabulary. The head has hidden size "
        "times classes parameters.",
        needs="Texts with labels (the source `labelled`).",
        avoid_when="Classes are many or change: let the model write the class instead. Without the causal "
        "mask the trained model can no longer write.",
    ),
)
class Classify(Objective):
    options: ClassifyOptions
    unit = "text"

    def __init__(self, options: ClassifyOptions) -> None:
        super().__init__(options)
        self.classifier: Classifier | None = None

    def source(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        if spec.get("kind") != "labelled":
            raise ConfigError(
                f"objective 'classify' needs texts with labels, and a source is of kind {spec.get('kind')!r};"
                " use sources of kind 'labelled'"
            )
        own, given = list(self.options.labels), spec.get("labels") or []
        if given and list(given) != own:
            raise ConfigError(
                f"a source has the labels {list(given)} and objective 'classify' {own}; leave them out of "
                "the source, or write the same in both"
            )
        return {**spec, "labels": own}

    def extra_modules(self, model: Model) -> nn.Module:
        """The head, made at the first call."""
        if self.classifier is None:
            o = self.options
            head = Classifier(model.config.hidden_size, o.labels, o.pooling, o.causal, o.seed)
            self.classifier = head.to(model.device)
        return self.classifier

    def units(self, batch: Batch) -> int:
        """Texts with a label."""
        return int((self._labels(batch) >= 0).sum())

    def loss_sum(self, model: Model, batch: Batch) -> torch.Tensor:
        return self._loss(self._logits(model, batch), batch)

    def held_out_sums(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        logits = self._logits(model, batch)
        right = (logits.argmax(-1) == self._labels(batch)).sum()
        return {"loss": self._loss(logits, batch), "accuracy": right}

    def save_extra(self, folder: Path, model: Model) -> None:
        """Write the head into the folder of the trained `model`."""
        assert self.classifier is not None
        self.classifier.save(folder, model)

    def _logits(self, model: Model, batch: Batch) -> torch.Tensor:
        assert self.classifier is not None, "extra_modules comes first"
        return self.classifier(model, batch.tokens, batch.lengths)

    def _loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, self._labels(batch), reduction="sum", ignore_index=-100)

    def _labels(self, batch: Batch) -> torch.Tensor:
        if batch.labels is None:
            raise ConfigError("objective 'classify' needs texts with labels; use sources of kind 'labelled'")
        largest, count = int(batch.labels.max()), len(self.options.labels)
        if largest >= count:
            raise ConfigError(
                f"the data have the label {largest}, but objective 'classify' names {count} classes (0 to "
                f"{count - 1}); name all of them in 'labels'"
            )
        return batch.labels
