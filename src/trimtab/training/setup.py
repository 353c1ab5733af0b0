"""From a recipe to the parts of a run: the model to train, its data, its objective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from trimtab.errors import ConfigError
from trimtab.models.checkpoint import load
from trimtab.models.config import config_from_dict
from trimtab.models.tokenizer import Tokenizer
from trimtab.models.transformer import Model
from trimtab.registry import OBJECTIVES
from trimtab.training.data.sources.build import SourceContext
from trimtab.training.objectives.base import Objective
from trimtab.training.recipe import ModelSettings, Recipe
from trimtab.training.starting.blending import blend
from trimtab.training.starting.growing import grow
from trimtab.training.starting.initial import initial_model
from trimtab.training.starting.tokenizers.replace import replace_tokenizer


def build_model(recipe: Recipe) -> Model:
    """The float32 model that a recipe starts from, every parameter trainable."""
    settings = recipe.model
    if settings.source is not None:
        source = local_path(settings.source, recipe.folder)
        model = load(None if source == "shipped" else source, dtype="float32")
        if settings.blend is not None:
            other = load(local_path(settings.blend, recipe.folder), dtype="float32")
            model = blend(model, other, 0.5 if settings.blend_share is None else settings.blend_share)
    else:
        assert settings.config is not None
        model = initial_model(config_from_dict(settings.config, where="'model.config'"), recipe.seed)
    if settings.tokenizer is not None and model.tokenizer is not None and model.tokenizer.available:
        raise ConfigError(
            f"'model.tokenizer' is {settings.tokenizer!r}, but the model has a tokenizer, which its "
            "embeddings belong to; leave it out, or put another in its place with 'model.new_tokenizer'"
        )
    if settings.tokenizer is not None:
        folder = Path(local_path(settings.tokenizer, recipe.folder))
        model.tokenizer = Tokenizer.from_folder(folder, model.config.vocab_size)
        model.path = folder
    if settings.new_tokenizer is not None:
        new = Tokenizer.from_folder(local_path(settings.new_tokenizer, recipe.folder))
        model = replace_tokenizer(model, new, settings.new_embeddings, seed=recipe.seed)
    if settings.layers is not None or settings.intermediate_size is not None:
        model = grow(model, settings.layers, settings.intermediate_size, seed=recipe.seed)
    if settings.rope_theta is not None or settings.context is not None:
        model = with_context(model, settings)
    # Loaded parameters are views of the file; training needs memory of its own.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    return model.train()


def with_context(model: Model, settings: ModelSettings) -> Model:
    """The same weights with another rope base and context length (ChuXin, arXiv 2405.04828)."""
    raw = dict(model.config.raw)
    if settings.rope_theta is not None:
        raw["rope_theta"] = settings.rope_theta
        for key in ("rope_parameters", "rope_scaling"):
            # Newer files have the base in here, where it goes before the one outside.
            if "rope_theta" in (raw.get(key) or {}):
                raw[key] = raw[key] | {"rope_theta": settings.rope_theta}
    if settings.context is not None:
        raw["max_position_embeddings"] = settings.context
    with torch.device("meta"):
        longer = Model(config_from_dict(raw))
    longer.load_state_dict(model.state_dict(), assign=True)
    longer.tokenizer, longer.path = model.tokenizer, model.path
    return longer


def build_context(
    recipe: Recipe, model: Model, progress: Callable[[str], None] | None = None
) -> SourceContext:
    """What the sources of this run share."""
    if model.tokenizer is None or not model.tokenizer.available:
        raise ConfigError(
            f"the model of {recipe.where} has no tokenizer; name a folder with one as 'model.tokenizer'"
        )
    return SourceContext(
        tokenizer=model.tokenizer,
        vocab_size=model.config.vocab_size,
        folder=recipe.folder,
        cache=None if recipe.cache is None else Path(recipe.cache),
        seed=recipe.seed,
        window=recipe.window or model.config.context_length,
        longest=model.config.context_length,
        progress=progress,
    )


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's objective with its options."""
    options = dict(recipe.objective)
    name = str(options.pop("name", "lm"))
    method = OBJECTIVES.get(name)
    return method.cls(OBJECTIVES.build_options(name, options))


def local_path(name: str, folder: Path) -> str:
    """`name` below the recipe's folder where something is there, else as it is (a hub id, say)."""
    inside = folder / name
    return str(inside) if not Path(name).is_absolute() and inside.exists() else name
