"""Writing a model back as a Hugging Face folder: all of it, or nothing.

The folder is written beside its destination under a temporary name and renamed at the end, so a full disk
or an interruption leaves neither half a model nor a damaged old one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trimtab.errors import ConfigError, OutputError
from trimtab.models.config import config_from_dict
from trimtab.models.hub import TOKENIZER_FILES
from trimtab.models.transformer import Model

_METADATA = {"format": "pt"}  # transformers refuses files without it


def save(
    model: Model, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000, overwrite: bool = False
) -> Path:
    """Write `model` to `folder` as config, safetensors and the tokenizer files it was loaded with.

    Weights are written as they are, in their dtype, in files of at most `max_shard_bytes` each (a single
    larger tensor gets a file of its own). An existing folder is replaced only with `overwrite`. Raises
    OutputError where that is missing or writing fails; then `folder` is as it was. ConfigError for a model
    with quantized weights, which that format cannot say.
    """
    if model.weights != "plain":
        raise ConfigError(
            f"the model's weights are {model.weights}, which a checkpoint cannot hold; save the model as it "
            f"was loaded, and give weights={model.weights} wherever it runs"
        )
    if max_shard_bytes < 1:
        raise OutputError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    config = _config_json(model)

    def fill(scratch: Path) -> None:
        _write_weights(model, scratch, max_shard_bytes)
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _copy_side_files(model, scratch)

    return replace_folder(Path(folder).expanduser(), fill, what="the model", overwrite=overwrite)


def replace_folder(folder: Path, fill: Callable[[Path], None], *, what: str, overwrite: bool) -> Path:
    """Let `fill` write a folder beside `folder` and put it in its place; OutputError leaves all as it was."""
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty; choose another folder or pass overwrite=True")
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        scratch.chmod(0o755)
        fill(scratch)
        _put_in_place(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{what} could not be written to {folder}: {error}") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _config_json(model: Model) -> dict[str, Any]:
    raw = dict(model.config.raw)
    if config_from_dict(raw, more_eos=list(model.config.eos_token_ids)) != model.config:
        raise OutputError(
            "model.config does not say what model.config.raw says, so no true config.json can be written; "
            "make the config with config_from_dict"
        )
    name = str(model.dtype).removeprefix("torch.")
    keys = [key for key in ("torch_dtype", "dtype") if key in raw] or ["dtype"]
    return raw | dict.fromkeys(keys, name)


def _write_weights(model: Model, folder: Path, max_shard_bytes: int) -> None:
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _write_shard(tensors, shards[0], folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(tensors, names, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(tensors: dict[str, torch.Tensor], names: list[str], file: Path) -> None:
    save_file({name: tensors[name].cpu().contiguous() for name in names}, file, metadata=_METADATA)
    # A rename is atomic only for what has reached the disk.
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _shards(tensors: dict[str, torch.Tensor], max_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _copy_side_files(model: Model, folder: Path) -> None:
    if model.path is None:
        return
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        source = model.path / name
        if source.is_file():
            # The bytes only: the source may be read-only, or a link into the hub's cache.
            shutil.copyfile(source, folder / name)


def _put_in_place(scratch: Path, folder: Path) -> None:
    if not folder.exists():
        scratch.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    old = aside / "old"
    folder.rename(old)
    try:
        scratch.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
