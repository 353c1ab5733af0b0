"""Training checkpoints: everything a run needs to go on bit for bit, in one folder, whole or absent.

`tensors.safetensors` and `state.json`, with their SHA-256 sums in `SHA256SUMS` (`sha256sum -c` reads it). The
folder is written beside its place, flushed to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trimtab.errors import CheckpointError
from trimtab.models.save import replace_folder
from trimtab.training.keeping.folder import to_disk

TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
FORMAT = 2  # 1 had no checksums
_NAME = re.compile(r"step-(\d{8})$")


def write(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` under `folder` and remove all but the last `keep`.

    Raises OutputError where writing fails; then the older checkpoints are as they were.
    """

    def fill(scratch: Path) -> None:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, scratch / TENSORS)
        text = json.dumps(state | {"format": FORMAT}) + "\n"
        (scratch / STATE).write_text(text, encoding="utf-8")
        sums = "".join(f"{_sha256(scratch / name)}  {name}\n" for name in (TENSORS, STATE))
        (scratch / SUMS).write_text(sums, encoding="utf-8")
        for path in (*scratch.iterdir(), scratch):
            to_disk(path)

    made = replace_folder(folder / f"step-{step:08d}", fill, what="the checkpoint", overwrite=True)
    to_disk(folder)
    for old in all_of(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return made


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if _NAME.search(p.name)) if folder.is_dir() else []


def read(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint; CheckpointError where it is damaged."""
    try:
        _check_sums(checkpoint)
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if state.get("format", 1) >= FORMAT and not (checkpoint / SUMS).exists():
            raise CheckpointError(f"{SUMS} is missing")
        return load_file(checkpoint / TENSORS), state
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {checkpoint} is damaged: {error}") from None


def read_last(
    folder: Path, say: Callable[[str], None]
) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    A damaged one is told through `say` and put aside as `step-XXXXXXXX.damaged`. Raises CheckpointError where
    all are damaged, and leaves them.
    """
    found = all_of(folder)
    damaged: list[tuple[Path, CheckpointError]] = []
    for path in reversed(found):
        try:
            tensors, state = read(path)
        except CheckpointError as error:
            damaged.append((path, error))
            continue
        for bad, error in damaged:
            say(f"{error}; going on from {path.name} instead")
            aside = bad.with_name(f"{bad.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
        return path, tensors, state
    if damaged:
        raise CheckpointError(f"no checkpoint in {folder} is whole; the newest: {damaged[0][1]}")
    return None


def _check_sums(checkpoint: Path) -> None:
    if not (checkpoint / SUMS).exists():
        return
    for line in (checkpoint / SUMS).read_text(encoding="utf-8").splitlines():
        wanted, _, name = line.partition("  ")
        if _sha256(checkpoint / name) != wanted:
            raise CheckpointError(f"{name} does not have its checksum")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
