"""Retrieval heads: how much of a needle each query head copies, measured on needle prompts.

Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, 2024, arXiv 2404.15574.

The texts are the hay; `trimtab.evaluation.inspection.heads` has the measure and where it deviates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.calibration.base import Calibration, CalibrationOptions, Progress
from trimtab.calibration.fitting.data import read_sequences
from trimtab.evaluation.inspection.heads import needle_cases, score_heads, tokenizer_of
from trimtab.evaluation.tasks.needle import Case, NeedleOptions
from trimtab.registry import CALIBRATIONS, Card

if TYPE_CHECKING:
    from trimtab.models.transformer import Model


@dataclass(frozen=True, slots=True)
class RetrievalHeadsCalibrationOptions(CalibrationOptions):
    lengths: tuple[int, ...] = field(default=(256, 512, 1024), metadata={"help": "prompt lengths in tokens"})
    depths: int = field(default=5, metadata={"help": "places of the needle, evenly from start to end"})
    samples: int = field(default=4, metadata={"help": "needles for each length and depth"})

    def __post_init__(self) -> None:
        CalibrationOptions.__post_init__(self)
        self.needles()

    def needles(self) -> NeedleOptions:
        """The same as the needle task takes it, which checks it too."""
        return NeedleOptions(self.lengths, self.depths, self.samples)


@CALIBRATIONS.add(
    options=RetrievalHeadsCalibrationOptions,
    card=Card(
        title="Retrieval heads",
        idea="Scores every query head by how much of a needle it looks at while the model puts that out.",
        exactness="As published; the needle is the number asked for, and only exactly right answers count.",
        cost="One greedy answer a prompt on plain torch: lengths x depths x samples prompts.",
        needs="A model with a tokenizer that answers needle questions; texts for the hay.",
        avoid_when="The model does not find needles: there is nothing to score then.",
        paper="Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, 2024",
        arxiv="2404.15574",
    ),
)
class RetrievalHeadsCalibration(Calibration):
    @staticmethod
    def fit(
        model: Model, sequences: Tensor, options: Any, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`scores` float32 [L, H], the mean of `trials` float32 [n, L, H], one for each right answer."""
        found = score_heads(model, cases(model, sequences, options), lambda share: progress("needles", share))
        return {"scores": found.scores, "trials": found.trials}, {"found": found.found, "asked": found.asked}


def cases(model: Model, sequences: Tensor, options: RetrievalHeadsCalibrationOptions) -> list[Case]:
    """The needle prompts, in hay made of the texts."""
    tokenizer = tokenizer_of(model)
    prose = " ".join(tokenizer.decode(row) for row in sequences.tolist())
    return needle_cases(model, prose, options.needles(), options.seed)


def prompts(model: Model, data: str, options: RetrievalHeadsCalibrationOptions) -> list[Case]:
    """The needle prompts that `fit` asks with these options."""
    length = min(options.tokens, model.config.context_length)
    read = read_sequences(data, model, count=options.sequences, length=length, seed=options.seed)
    return cases(model, read.tokens, options)
