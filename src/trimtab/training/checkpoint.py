"""Training checkpoints: everything a run needs to go on bit for bit, in one folder, whole or absent."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trimtab.models.save import replace_folder

_NAME = re.compile(r"step-(\d{8})$")


def write(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` under `folder` and remove all but the last `keep`."""

    def fill(scratch: Path) -> None:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, scratch / "tensors.safetensors")
        (scratch / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")

    made = replace_folder(folder / f"step-{step:08d}", fill, what="the checkpoint", overwrite=True)
    for old in all_of(folder)[:-keep]:
        shutil.rmtree(old)
    return made


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if _NAME.search(p.name)) if folder.is_dir() else []


def read(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return load_file(checkpoint / "tensors.safetensors"), state
