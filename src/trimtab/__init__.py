"""trimtab: bolt small parts onto a language model you already have, and measure what each one costs.

Importing the package imports nothing heavy: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.decoding.constraints.base import StructuredOutputs
    from trimtab.decoding.sampling_params import SamplingParams
    from trimtab.engine.engine import Engine
    from trimtab.errors import TrimtabError
    from trimtab.evaluation.runner import Report, compare
    from trimtab.models.checkpoint import load
    from trimtab.models.transformer import Model
    from trimtab.plan import Plan
    from trimtab.training.api import train

__version__ = "0.1.0"

_HOME = {
    "Engine": "trimtab.engine.engine",
    "Model": "trimtab.models.transformer",
    "Plan": "trimtab.plan",
    "Report": "trimtab.evaluation.runner",
    "SamplingParams": "trimtab.decoding.sampling_params",
    "StructuredOutputs": "trimtab.decoding.constraints.base",
    "TrimtabError": "trimtab.errors",
    "compare": "trimtab.evaluation.runner",
    "load": "trimtab.models.checkpoint",
    "train": "trimtab.training.api",
}

__all__ = [
    "Engine",
    "Model",
    "Plan",
    "Report",
    "SamplingParams",
    "StructuredOutputs",
    "TrimtabError",
    "__version__",
    "compare",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
