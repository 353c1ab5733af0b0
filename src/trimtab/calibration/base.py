"""The interface of a calibration: texts in, an attachment out; the base model is never changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

import trimtab
from trimtab.attachment import Attachment, Base
from trimtab.calibration.fitting.data import read_sequences
from trimtab.errors import ConfigError
from trimtab.registry import CALIBRATIONS

if TYPE_CHECKING:
    from trimtab.models.transformer import Model

Progress = Callable[[str, float], None]  # what is being done, and the share of all that is done


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What every calibration lets one choose; a method's own options derive from it."""

    sequences: int = field(default=16, metadata={"help": "texts to look at"})
    tokens: int = field(default=2048, metadata={"help": "tokens a text, at most the model's context"})
    seed: int = field(default=0, metadata={"help": "decides which parts of the data are taken"})

    def __post_init__(self) -> None:
        for name in ("sequences", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"option {name!r} is {getattr(self, name)}; it must be at least 1")


class Calibration(ABC):
    """A method that fits something for a base model."""

    @staticmethod
    @abstractmethod
    def fit(
        model: Model, sequences: Tensor, options: Any, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors fitted for `model` on token ids `sequences` int64 [n, T], and what was measured.

        Raises ConfigError, before any work, for a model or for texts that cannot serve.
        """


def fit(
    kind: str,
    model: Model,
    data: str,
    options: Any = None,
    progress: Progress = lambda text, share: None,
) -> Attachment:
    """Run the calibration `kind` for `model` on `data`, a file or "shipped".

    `options` is a mapping or the method's options. Raises ConfigError for options or data that do not fit,
    before the model runs.
    """
    method = CALIBRATIONS.get(kind)
    if options is None or isinstance(options, Mapping):
        options = CALIBRATIONS.build_options(kind, options or {})
    length = min(options.tokens, model.config.context_length)
    read = read_sequences(data, model, count=options.sequences, length=length, seed=options.seed)
    tensors, measured = method.cls.fit(model, read.tokens, options, progress)
    made = {
        "data": read.name,
        "sha256": read.sha256,
        "sequences": read.tokens.shape[0],
        "tokens": read.tokens.numel(),
        "seed": options.seed,
        "trimtab": trimtab.__version__,
    }
    return Attachment(kind, Base.of(model), tensors, asdict(options), made, measured)
