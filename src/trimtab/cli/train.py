"""`trimtab train`: run a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import common
from trimtab.errors import ConfigError


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file (see recipes/).")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting put over the recipe's, e.g. optimizer.lr=1e-3; may be repeated.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The output folder, over the recipe's.", show_default=False),
    ] = None,
    threads: common.ThreadsOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Train a model by a recipe: pretraining, fine-tuning, context extension.

    \b
    Examples:
      trimtab train my-recipe.yaml
      trimtab train my-recipe.yaml --resume
      trimtab train my-recipe.yaml --set optimizer.lr=1e-3 --out runs/higher
    """
    from trimtab.training.recipe import parse_yaml

    pairs = [common.split_pair(text, "--set") for text in change or ()]
    changes = {key: parse_yaml(value, f"the value of --set {key}") for key, value in pairs}
    if out is not None:
        changes["output"] = str(out)
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads is {threads}; it must be at least 1")
        import torch

        torch.set_num_threads(threads)
    from trimtab.training.api import train

    done = train(recipe, resume=resume, changes=changes, note=common.note)
    # Under torchrun every process gets here; one of them speaks.
    if os.environ.get("RANK", "0") == "0":
        if as_json:
            common.write_json(done)
        elif done.finished:
            print(done.model)
    if not done.finished:
        raise typer.Exit(130)
