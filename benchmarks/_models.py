"""Variants of the shipped model: stretched to a longer context, and with outlier channels in its keys.

Each is a folder, so that whatever is fitted for it (codebooks, head scores) lies beside it as for any model.
The folders live as long as the process.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
        copy = _with_outliers(trimtab.load(dtype="float32"))
        copy.path = base.path  # its tokenizer files
        save(copy, path)
    else:
        # What was fitted for the shipped model does not fit a stretched one.
        fitted = ["attachments"] if context > TRAINED else []
        shutil.copytree(base.path, path, ignore=shutil.ignore_patterns(*fitted))
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


def _with_outliers(model: Model) -> Model:
    """A copy of `model` with outlier channels in its keys, and the same logits but for rounding; the tests'
    own, so that both speak of the same model."""
    path = Path(__file__).parents[1] / "tests" / "kvcache" / "outliers.py"
    spec = importlib.util.spec_from_file_location("outliers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.with_outliers(model)


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
