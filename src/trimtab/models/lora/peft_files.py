"""Adapters in the files of Hugging Face's PEFT, both ways: its config, and safetensors under its names.

What PEFT can do beyond plain LoRA (DoRA, trained biases, whole modules saved beside the adapter, other ranks
for some layers, ...) is refused by name rather than left out.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trimtab.errors import ConfigError, OutputError
from trimtab.models.lora.adapters import Adapters
from trimtab.models.lora.fill import put_on
from trimtab.models.lora.settings import LoraSettings
from trimtab.models.save import replace_folder
from trimtab.registry import build_dataclass

if TYPE_CHECKING:
    from trimtab.models.transformer import Model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(.+)\.(lora_[AB])\.weight")
# What describes an adapter and does not change what it computes.
_DESCRIPTIONS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
}
_USED = {"bias", "init_lora_weights", "lora_alpha", "lora_dropout", "r", "use_rslora"}
# Others (PiSSA, OLoRA, LoftQ, ...) begin by changing the weights that the adapter then belongs to.
_PLAIN_STARTS = (True, False, "true", "false", "gaussian", "orthogonal", "eva")


def save_peft(
    adapters: Adapters, folder: str | Path, base_model: str | None = None, overwrite: bool = False
) -> Path:
    """Write the adapters so that PEFT loads them; `base_model` is the name PEFT is to find the base by.

    Raises ConfigError for adapters of experts, which PEFT lays out otherwise, and OutputError where the
    folder cannot be written.
    """
    experts = [name for name in adapters.layers if ".experts." in name]
    if experts:
        raise ConfigError(
            f"PEFT's files have no common layout for experts, and {experts[0]} is adapted; leave the "
            "experts' projections out of 'targets', or save the adapter in trimtab's own format"
        )
    folder, settings = Path(folder).expanduser(), adapters.settings
    if overwrite and folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise OutputError(f"{folder} is not an adapter of PEFT, so it is not replaced; choose another folder")
    path = adapters.model.path
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model if base_model or path is None else str(path),
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapters.layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    parameters = adapters.named_parameters()
    tensors = {f"{_PREFIX}{n}.weight": p.detach().cpu().contiguous() for n, p in parameters.items()}

    def fill(scratch: Path) -> None:
        save_file(tensors, scratch / TENSORS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (scratch / TENSORS).chmod(0o644)  # safetensors leaves it to its owner alone
        for name in (TENSORS, CONFIG):
            with (scratch / name).open("rb") as written:
                os.fsync(written.fileno())

    return replace_folder(folder, fill, what="the adapter", overwrite=overwrite)


def load_peft(model: Model, folder: str | Path) -> Adapters:
    """Put an adapter that PEFT wrote on `model`.

    PEFT's files do not say for which weights an adapter was trained, so only names and shapes are checked.
    Raises ConfigError, and leaves the model as it is, for anything missing, broken or not supported.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder / CONFIG)
    tensors = {}
    for key, tensor in _read_tensors(folder).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ConfigError(
                f"{folder / TENSORS} holds {key!r}, which is no part of an adapter that trimtab has"
            )
        tensors[f"{match[1]}.{match[2]}"] = tensor
    targets = sorted({name.split(".")[-2] for name in tensors})
    settings = build_dataclass(
        LoraSettings,
        {
            "rank": config.get("r", 8),
            "alpha": config.get("lora_alpha", 8),
            "dropout": config.get("lora_dropout") or 0.0,
            "rslora": config.get("use_rslora") or False,
            "targets": targets,
        },
        where=str(folder / CONFIG),
    )
    return put_on(model, settings, tensors, str(folder))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing, so {file.parent} is not an adapter of PEFT") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ConfigError(f"{file} describes an adapter of type {kind!r}; trimtab reads LORA")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{file} sets 'bias' to {config['bias']!r}; trimtab reads adapters without biases")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ConfigError(
            f"{file} sets 'init_lora_weights' to {start!r}, which changes the base model's weights; convert "
            "the adapter to plain LoRA with PEFT first"
        )
    for key, value in config.items():
        if value and key not in _DESCRIPTIONS and key not in _USED:
            raise ConfigError(
                f"{file} sets {key!r} to {value!r}, which trimtab does not support; merge it with PEFT"
            )
    return config


def _read_tensors(folder: Path) -> dict[str, Any]:
    try:
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError:
        others = "; convert adapter_model.bin to it" if (folder / "adapter_model.bin").is_file() else ""
        raise ConfigError(f"{folder / TENSORS} is missing{others}") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / TENSORS} is damaged ({error}); fetch it again") from None
    if not tensors:
        raise ConfigError(f"{folder / TENSORS} holds no tensors")
    return tensors
