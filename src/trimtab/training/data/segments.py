"""The unit of training data: a stretch of tokens that attends to itself only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Segment:
    """`tokens[T]` integers; `trained[T]` is true for the tokens that the model is to predict.

    The first token is never predicted. `label` is a class for classification, None elsewhere.
    """

    tokens: np.ndarray
    trained: np.ndarray
    label: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def all_trained(tokens: np.ndarray) -> Segment:
    """A segment of plain text: every token but the first is predicted."""
    return Segment(tokens, np.ones(len(tokens), dtype=bool))
