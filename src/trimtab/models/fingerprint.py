"""A short name for a model's function, by which an artifact made for one model recognises it.

It covers the config (what changes the numbers; not the end tokens) and, of every parameter, its name, its
shape and about 1,024 elements spread evenly over it, rounded to bfloat16. So it is the same for one
checkpoint loaded in float32 or in bfloat16, differs after any training that touches the sampled elements,
and takes milliseconds even where the weights are mapped from disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch
from torch import nn

from trimtab.models.config import ModelConfig

_SAMPLES = 1024


class Fingerprint:
    """Keeps the last result, and forms it again when a parameter was replaced or written to.

    `fixed`: the fingerprint of the model that this one was made of and stands for, which holds for good.
    """

    def __init__(self, fixed: str | None = None) -> None:
        self._state: tuple[tuple[int, int], ...] | None = None
        self._fixed = fixed
        self._digest = ""

    def of(self, model: nn.Module) -> str:
        """The fingerprint of `model`, 64 hexadecimal digits."""
        if self._fixed is not None:
            return self._fixed
        state = tuple((p.data_ptr(), p._version) for p in model.parameters() if not p.is_inference())
        if state != self._state:
            self._digest = _digest(model)
            self._state = state
        return self._digest


def _digest(model: nn.Module) -> str:
    config = model.config
    assert isinstance(config, ModelConfig)
    described = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in ("raw", "bos_token_id", "eos_token_ids")
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        step = flat.numel() // _SAMPLES
        # Rows are of even length, so an odd step does not keep to one column.
        step |= 1
        sample = flat[::step].to("cpu", torch.bfloat16).contiguous()
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
