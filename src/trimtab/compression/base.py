"""The interface of a way to store a model's matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.models.transformer import Model


class WeightMethod(ABC):
    """Turns a loaded model into one of about the same function that stores its matrices in another way."""

    @staticmethod
    @abstractmethod
    def convert(model: Model, options: Any) -> Model:
        """`model` itself where it is stored so already, else a new model; the given one stays as it is.

        Raises ConfigError for a model that cannot be stored so.
        """
