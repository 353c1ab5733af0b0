"""Loss or gradient that is no number: the offending batch is kept, the error says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trimtab.errors import NumericsError, OutputError
from trimtab.models.save import replace_folder
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.segments import Segment

FIXES = (
    "a lower optimizer.lr, a longer schedule.warmup, optimizer.clip of 1.0, precision: float32, "
    "or leaving these texts out of the data"
)


def not_finite(
    what: str, step: int, segments: Sequence[Segment], folder: Path | None, tokenizer: Tokenizer | None
) -> NumericsError:
    """The error for step `step`, with `segments` saved under `folder`; `what` says what is no number.

    None as `folder` saves nothing: another process of the run does.
    """
    if folder is None:
        return NumericsError(f"{what} at step {step}; the first process tells more")
    place = folder / f"step-{step:08d}"
    try:
        save_segments(segments, place, tokenizer)
        kept = f"the texts of that step are in {place}"
    except OutputError as error:
        kept = f"the texts of that step could not be kept ({error})"
    return NumericsError(
        f"{what} at step {step}; {kept}, and checkpoints are as they were. "
        f"Likely fixes, in a new run: {FIXES}"
    )


def save_segments(segments: Sequence[Segment], folder: Path, tokenizer: Tokenizer | None) -> None:
    """`batch.npz` (`tokens`, `trained`, and `ends`, where each segment ends), and `batch.txt` to be read."""

    def fill(scratch: Path) -> None:
        np.savez(
            scratch / "batch.npz",
            tokens=np.concatenate([s.tokens for s in segments]),
            trained=np.concatenate([s.trained for s in segments]),
            ends=np.cumsum([len(s) for s in segments]),
        )
        if tokenizer is not None and tokenizer.available:
            texts = [tokenizer.decode(s.tokens.tolist(), skip_special_tokens=False) for s in segments]
            parts = [f"--- segment {i}\n{text}\n" for i, text in enumerate(texts)]
            (scratch / "batch.txt").write_text("".join(parts), encoding="utf-8")

    replace_folder(folder, fill, what="the batch", overwrite=True)
