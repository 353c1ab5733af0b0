"""`trimtab.train`: one call from a recipe to a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError
from trimtab.training.computing import choose_device
from trimtab.training.data.sources.build import build_mixture, validation_segments
from trimtab.training.keeping.folder import RunFolder
from trimtab.training.loop import Trainer
from trimtab.training.recipe import Recipe, read_recipe, recipe_from_dict
from trimtab.training.setup import build_context, build_model, build_objective
from trimtab.training.starting import lora
from trimtab.training.watching.samples import check_prompts, continue_prompts


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run left.

    Attributes:
        output: the run's folder: recipe, metrics, checkpoints, report.
        model: the folder of the trained model, in Hugging Face format.
        steps, tokens: optimiser steps and tokens of the whole run, earlier parts included.
        finished: False where a signal ended the run before its last step; there is then no model yet.
    """

    output: Path
    model: Path
    steps: int
    tokens: int
    finished: bool


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    changes: Mapping[str, Any] | None = None,
    note: Callable[[str], None] | None = None,
) -> Trained:
    """Run a recipe: a YAML file, a mapping of settings, or a `Recipe`.

    Args:
        resume: go on from the last checkpoint in the recipe's output folder, bit for bit.
        changes: settings put over those of the file or mapping, e.g. `{"optimizer.lr": 1e-3}`.
        note: told in a sentence what is being prepared.

    Raises ConfigError for settings, OutputError where the output folder holds something else or cannot be
    written, NumericsError where the loss stops being a number. What was reached is kept in checkpoints.
    """
    if isinstance(recipe, (str, Path)):
        recipe = read_recipe(recipe, changes)
    elif isinstance(recipe, Mapping):
        recipe = recipe_from_dict(recipe, changes=changes)
    elif changes:
        raise ConfigError("'changes' go over a file or a mapping; this recipe is made already")
    # Before data is tokenized, which may take long.
    RunFolder(recipe.output).check(resume)
    choose_device(recipe.device)
    say = note or (lambda _: None)
    trainer = prepare(recipe, say)
    trainer.start(resume, say=say if trainer.ranks.is_first else lambda _: None)
    finished = trainer.train()
    return Trained(trainer.output, trainer.folder.model, trainer.step, trainer.tokens, finished)


def prepare(recipe: Recipe, note: Callable[[str], None]) -> Trainer:
    """The trainer of a recipe: model loaded, data tokenized, nothing written to its output folder yet."""
    model = build_model(recipe)
    context = build_context(recipe, model, note)
    adapters = None if recipe.lora is None else lora.apply(model, recipe.lora, f"'lora' in {recipe.where}")
    objective = build_objective(recipe)
    mixture = [objective.source(spec) for spec in recipe.mixture]
    trainer = Trainer(recipe, model, build_mixture(mixture, context), objective)
    if recipe.validation is not None:
        spec = objective.source({key: value for key, value in recipe.validation.items() if key != "every"})
        held_out = validation_segments(spec, context)
        trainer.validation = held_out.segments
        trainer.validation_bytes = held_out.text_bytes if trainer.objective.unit == "token" else None
    if recipe.samples is not None:
        check_prompts(model, recipe.samples.prompts)
        trainer.generate = partial(continue_prompts, max_tokens=recipe.samples.max_tokens)
    if adapters is not None:
        trainer.frozen = adapters.base.fingerprint
        made = {"trained on": [dict(source) for source in recipe.mixture], "tokens": recipe.tokens}
        trainer.export = lora.exporter(adapters, recipe.save_dtype, made)
    return trainer
