"""Adapters as an attachment: a folder that knows which model it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trimtab
from trimtab.attachment import FACTS, Attachment, Base
from trimtab.errors import ConfigError, OutputError
from trimtab.models.lora.adapters import Adapters
from trimtab.models.lora.fill import put_on
from trimtab.models.lora.peft_files import CONFIG, load_peft
from trimtab.models.lora.settings import LoraSettings
from trimtab.registry import build_dataclass

if TYPE_CHECKING:
    from trimtab.models.transformer import Model

KIND = "lora"


def save_adapters(
    adapters: Adapters,
    folder: str | Path,
    made: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapters to `folder`, all or nothing; `made` says what they were trained on.

    Raises OutputError where that cannot be written, or an existing folder would be replaced unasked.
    """
    tensors = {name: parameter.detach().float() for name, parameter in adapters.named_parameters().items()}
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken or not tensors:
        what = f"{broken[0]!r} holds values that are not numbers" if broken else "there are no adapters"
        raise OutputError(f"the adapter is not written to {folder}: {what}")
    made = dict(made or {}) | {"trimtab": trimtab.__version__}
    options = asdict(adapters.settings) | {"targets": list(adapters.settings.targets)}
    return Attachment(KIND, adapters.base, tensors, options, made).save(folder, overwrite=overwrite)


def load_adapters(model: Model, folder: str | Path) -> Adapters:
    """Put the adapters in `folder` on `model`; the folder is ours or PEFT's.

    Raises ConfigError, and leaves the model as it is, for a folder that holds none, for damage, for adapters
    of another model (ours are known by their fingerprint, PEFT's by their shapes alone).
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"there is no adapter at {folder}; name the folder that holds {FACTS} or {CONFIG}")
    if (folder / FACTS).is_file():
        return _load_own(model, folder)
    if (folder / CONFIG).is_file():
        return load_peft(model, folder)
    raise ConfigError(f"{folder} is not an adapter: it has neither {FACTS} nor {CONFIG}")


def _load_own(model: Model, folder: Path) -> Adapters:
    found = Attachment.load(folder)
    if found.kind != KIND:
        raise ConfigError(f"{folder} is an attachment of kind {found.kind!r}, not an adapter")
    base = Base.of(model)
    if base.fingerprint != found.base.fingerprint:
        raise ConfigError(
            f"the adapter {folder} was trained for {found.base}, and this model is {base}; load that model, "
            "or train an adapter for this one"
        )
    settings = build_dataclass(LoraSettings, found.options, where=f"the options in {folder / FACTS}")
    return put_on(model, settings, found.tensors, str(folder))
