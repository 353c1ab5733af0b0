"""Put a trained model in its place in the package, with its card, its curves and what is fitted for it.

    BOOKS=path/to/books python dev/ship.py runs/tiny/model tiny --figures figures.json

The folder is made anew as a whole, so nothing that belonged to an older model stays.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import card
import curves
import torch

import trimtab
from trimtab.calibration.base import fit
from trimtab.cli import inspect
from trimtab.cli.common import note
from trimtab.errors import ConfigError, TrimtabError
from trimtab.models import hub
from trimtab.models.save import replace_folder, save
from trimtab.models.transformer import Model

MOST_BYTES = 24_000_000  # of a model's weights; they are part of every installation
MOST_PICTURE_BYTES = 60_000
FITTED_ON = "train-03.jsonl.zst"  # books the models were trained on, not those that tasks score
KINDS = ("kvquant", "rotatekv", "retrieval_heads")
FITTED = {"tiny": KINDS, "chat": KINDS}  # a draft is only used beside another model


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a trained model in its place in the package.")
    parser.add_argument("model", type=Path, metavar="RUN_MODEL_FOLDER", help="the trained model")
    parser.add_argument("name", metavar="NAME", help="tiny, draft or chat")
    parser.add_argument("--figures", type=Path, default=Path("figures.json"), help="of measure_models.py")
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="outputs of the training runs behind it, in order; default: the folder around the model",
    )
    args = parser.parse_args()
    try:
        print(ship(args.model, args.name, args.figures, args.runs or [args.model.resolve().parent]))
    except TrimtabError as error:
        sys.exit(f"error: {error}")


def ship(source: Path, name: str, figures: Path, runs: list[Path]) -> Path:
    """Make the folder of the shipped model `name` from `source`, and put it in the place of the old one."""
    model = trimtab.load(source).to(torch.bfloat16)
    check(model, name)
    text = card.card(name, model, card.figures_of(model, figures), runs)
    picture = curves.losses([card.metrics_of(run) for run in runs])
    if len(picture.encode()) > MOST_PICTURE_BYTES:
        raise ConfigError(f"the picture of the curves has {len(picture):,} bytes; plot fewer points")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / name  # attachments keep the folder's name as the model's
        save(model, made)
        write_generation_config(model, made)
        (made / "README.md").write_text(text, encoding="utf-8")
        (made / "curves.svg").write_text(picture, encoding="utf-8")
        attach(made, FITTED.get(name, ()))

        def fill(folder: Path) -> None:
            # Without modes: safetensors files are made for their owner alone.
            shutil.copytree(made, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)

        return replace_folder(hub.SHIPPED / name, fill, what="the model", overwrite=True)


def check(model: Model, name: str) -> None:
    """ConfigError for a model that cannot ship: too large, or with another tokenizer than its siblings'."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > MOST_BYTES:
        raise ConfigError(
            f"{model.path} has {size:,} bytes of weights; a shipped model has at most {MOST_BYTES:,}"
        )
    assert model.path is not None
    mine = (model.path / "tokenizer.json").read_bytes()
    for other in hub.shipped_names():
        if other != name and (hub.SHIPPED / other / "tokenizer.json").read_bytes() != mine:
            raise ConfigError(f"{model.path} has another tokenizer than {other!r}; shipped models share one")


def write_generation_config(model: Model, folder: Path) -> None:
    """The special tokens for generation, where training has left no such file."""
    file = folder / "generation_config.json"
    if not file.exists():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        found = {key: model.config.raw[key] for key in keys if key in model.config.raw}
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def attach(folder: Path, kinds: tuple[str, ...]) -> None:
    """Fit what methods need for the model in `folder`, on needles in the shipped text or on books."""
    if not kinds:
        return
    books = os.environ.get("BOOKS")
    if books is None:
        raise ConfigError(f"BOOKS is not set; let it name the folder that holds {FITTED_ON}")
    model = trimtab.load(folder, dtype="float32")
    for kind in kinds:
        note(f"fitting {kind}")
        place = folder / "attachments" / kind
        if kind == "retrieval_heads":
            # The command also measures what is lost without these heads, and keeps it in the attachment.
            with tempfile.TemporaryDirectory() as scratch:
                inspect.heads(str(folder), out=Path(scratch))
                shutil.copytree(Path(scratch) / kind, place)
        else:
            fit(kind, model, str(Path(books) / FITTED_ON)).save(place)


if __name__ == "__main__":
    main()
