"""Variants of the shipped model: stretched to a longer context, and with outlier channels in its keys.

Each is a folder, so that whatever is fitted for it (codebooks, head scores) lies beside it as for any model.
The folders live as long as the process.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import trimtab
from trimtab import Model
from trimtab.models.save import save

TRAINED = 2048  # tokens of context that the shipped model was trained with
# Of the scalings without training, factor 4, on shipped text of 8K tokens, perplexity from token 6144 on:
# none 120, linear 102, dynamic 86, yarn 42 (without its attention factor 46; tokens 1024-2048 of the model
# as it is: 43).
STRETCH = "YaRN, untrained"


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="trimtab-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def folder(context: int = TRAINED, outliers: bool = False) -> Path:
    """The shipped model with room for `context` tokens, with or without outlier channels."""
    base = trimtab.load()
    assert base.path is not None
    path = _scratch() / f"shipped-{context}{'-outliers' if outliers else ''}"
    if path.is_dir():
        return path
    if outliers:
        save(with_outliers(trimtab.load(dtype="float32")), path)
    else:
        shutil.copytree(base.path, path, ignore=shutil.ignore_patterns("attachments"))
    if context > TRAINED:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        raw["max_position_embeddings"] = context
        raw["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": context / TRAINED,
            "original_max_position_embeddings": TRAINED,
        }
        (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return path


def variant(dtype: str, context: int = TRAINED, outliers: bool = False) -> Model:
    """The model of `folder`, loaded in `dtype`."""
    return trimtab.load(str(folder(context, outliers)), dtype=dtype)


@torch.no_grad()
def with_outliers(model: Model, factor: float = 20.0, pairs: int = 2, seed: int = 0) -> Model:
    """`model` itself with `pairs` rotary pairs (so 2 * `pairs` channels) of every key head `factor` times as
    large, and the queries' same channels as much smaller: equal logits but for rounding."""
    c = model.config
    d, group = c.head_dim, c.num_heads // c.num_kv_heads
    rng = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention = layer.self_attn
        for head in range(c.num_kv_heads):
            first = torch.randperm(d // 2, generator=rng)[:pairs]
            # Rotation mixes the two channels of a pair, so both have to grow alike.
            channels = torch.cat([first, first + d // 2])
            _scale(attention.k_proj, head * d + channels, factor)  # type: ignore[union-attr]
            for query in range(head * group, (head + 1) * group):
                _scale(attention.q_proj, query * d + channels, 1 / factor)  # type: ignore[union-attr]
    return model


def _scale(linear: torch.nn.Linear, rows: torch.Tensor, factor: float) -> None:
    linear.weight[rows] *= factor
    if linear.bias is not None:
        linear.bias[rows] *= factor


def attach(kind: str, model: Path, data: Path) -> str | None:
    """Fit what the method `kind` needs for the model in `model` on the text `data`, through the command line;
    None, or why it failed. What is there already is left as it is."""
    out = model / "attachments" / kind
    if out.is_dir():
        return None
    command = ["attach", kind, str(model), "--data", str(data), "--out", str(out)]
    code = f"import sys; from trimtab.cli.main import main; sys.argv = ['trimtab', *{command!r}]; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return None if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())[-300:]
