"""How many bytes of text the predicted tokens of segments stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from trimtab.models.detokenizer import token_bytes
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.segments import Segment


def text_bytes(tokenizer: Tokenizer, segments: Iterable[Segment]) -> int:
    """The UTF-8 bytes of all trained tokens but each segment's first, which is never predicted.

    Special tokens stand for no text. Bits per byte is the summed loss in nats, over ln 2, over this.
    """
    counts: Counter[int] = Counter()
    for segment in segments:
        ids, times = np.unique(segment.tokens[1:][segment.trained[1:]], return_counts=True)
        counts.update(dict(zip(ids.tolist(), times.tolist(), strict=True)))
    return sum(
        times * len(token_bytes(tokenizer, i))
        for i, times in counts.items()
        if i not in tokenizer.special_ids
    )
