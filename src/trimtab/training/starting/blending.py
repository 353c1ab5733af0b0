"""The weighted mean of two models of one family, to go on from or to keep (WiSE-FT, arXiv 2109.01903).

Training on one thing costs some of another. Where both models come from the same weights, points on the line
between them often keep most of both.
"""

from __future__ import annotations

import torch

from trimtab.errors import ConfigError
from trimtab.models.transformer import Model


def blend(model: Model, other: Model, share: float) -> Model:
    """`model`, changed to `1 - share` of itself and `share` of `other`, parameter by parameter.

    Raises ConfigError where the two differ in shape or tokenizer.
    """
    mine, theirs = model.state_dict(), other.state_dict()
    differ = [name for name in mine if name not in theirs or theirs[name].shape != mine[name].shape]
    differ += [name for name in theirs if name not in mine]
    if differ or _words(model) != _words(other):
        reason = f"{differ[0]!r} has another shape there" if differ else "they have different tokenizers"
        raise ConfigError(
            f"'model.blend' is {str(other.path)!r}, which cannot be blended with {str(model.path)!r}: "
            f"{reason}; both must have been trained from the same weights"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.lerp(theirs[name].to(parameter), share)
    return model


def _words(model: Model) -> dict[str, int] | None:
    if model.tokenizer is None or not model.tokenizer.available:
        return None
    return model.tokenizer.backend.get_vocab()
