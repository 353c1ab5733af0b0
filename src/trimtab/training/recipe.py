"""A training run as a YAML file: every setting, nothing implied by the command line.

Paths in a recipe are relative to the recipe's folder; `output` and `cache` are relative to the current one.
`$NAME` in a value stands for an environment variable, so that a recipe need not know where data lies.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from trimtab.errors import ConfigError, did_you_mean
from trimtab.registry import build_dataclass
from trimtab.training.optimizers.schedule import Schedule


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Where the weights come from.

    source: a model folder, a hub id, or `shipped`; empty with `config`.
    config: keys of a Hugging Face config.json, for a model with random weights.
    tokenizer: a folder with the tokenizer; default: the model's own.
    new_tokenizer: a folder with a tokenizer to put in the place of the model's, for another language.
    new_embeddings: where the rows of its tokens come from; see `replace_tokenizer`.
    layers, intermediate_size: grow the loaded model to these sizes without changing what it computes.
    blend, blend_share: another model of the same shape, and its share in a mean to start from (half).
    rope_theta, context: train on with another base of the rotary embedding and a longer context.
    """

    source: str | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    new_tokenizer: str | None = None
    new_embeddings: Literal["fvt", "mean", "random"] = "fvt"
    layers: int | None = None
    intermediate_size: int | None = None
    blend: str | None = None
    blend_share: float | None = None
    rope_theta: float | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.config is None):
            raise ConfigError("the recipe's 'model' needs either 'source' or 'config', and not both")
        if self.blend_share is not None and not 0 <= self.blend_share <= 1:
            raise ConfigError(f"'blend_share' of the model is {self.blend_share}; it must be from 0 to 1")
        if self.blend is not None and self.source is None:
            raise ConfigError("'blend' of the model needs a 'source' to be blended with")
        if self.blend_share is not None and self.blend is None:
            raise ConfigError("'blend_share' of the model is the share of 'blend', which is missing")
        if self.config is not None and not isinstance(self.config, Mapping):
            raise ConfigError(f"'config' of the model is {self.config!r}; it must be a mapping of settings")


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """How weights move.

    name: `muon` (hidden matrices by Muon, everything else by AdamW) or `adamw`.
    lr: peak learning rate.
    weight_decay: decoupled; of matrices only.
    clip: largest norm of all gradients together; none = no clipping.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = 2e-3
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"'{name}' of the optimizer is {value}; it must be a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"'weight_decay' of the optimizer is {self.weight_decay}; it must be a number from 0 up"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"'betas' of the optimizer are {list(self.betas)}; give two numbers from 0 to below 1"
            )
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"'momentum' of the optimizer is {self.momentum}; it must be from 0 to below 1")


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """Texts that the model goes on with as it is trained.

    every: steps between two rounds; one more is taken after the last step.
    """

    prompts: tuple[str, ...]
    every: int = 500
    max_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("every", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' of the samples is {getattr(self, name)}; it must be at least 1")
        if not self.prompts:
            raise ConfigError("the samples have no prompts; give at least one or leave 'samples' out")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run.

    mixture: sources of data, each a mapping with `kind`, `weight` and the kind's own settings.
    tokens: how many tokens to train on, all of a segment counted.
    batch_tokens: tokens of one optimiser step (at least; segments are not cut to fit).
    micro_batch_tokens: tokens that go through the model at a time.
    window: longest segment of plain text, in tokens; default: the model's context.
    lora: settings of a LoRA attachment (`rank`, `alpha`, `targets`, ...) to train instead of the model.
    cache: where tokenized files are kept; default: the user's cache folder.
    device: where to train; `auto` is a GPU where there is one.
    precision: `bfloat16` multiplies matrices in that type (autocast); weights stay float32.
    activation_checkpointing: keep only what enters each layer for the backward pass; the rest is recomputed.
    compile: run the row-wise parts of the layers through torch.compile.
    ema: decay of a running average of the weights, which is then validated and saved; none = no average.
    log_seconds: time between two lines of progress where the output is no terminal.
    tensorboard: also write the metrics for TensorBoard, to `tensorboard/` in the output.
    """

    output: str
    model: ModelSettings
    mixture: tuple[Mapping[str, Any], ...]
    tokens: int
    batch_tokens: int = 16_384
    micro_batch_tokens: int = 4_096
    window: int | None = None
    cache: str | None = None
    lora: Mapping[str, Any] | None = None
    objective: Mapping[str, Any] = field(default_factory=lambda: {"name": "lm"})
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: Schedule = field(default_factory=Schedule)
    validation: Mapping[str, Any] | None = None
    samples: SampleSettings | None = None
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    ema: float | None = None
    checkpoint_minutes: float = 5.0
    keep_checkpoints: int = 2
    log_seconds: float = 10.0
    tensorboard: bool = False
    seed: int = 0
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    where: str = "the recipe"
    folder: Path = Path()

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "micro_batch_tokens", "keep_checkpoints", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"'{name}' of {self.where} is {value}; it must be at least 1")
        for name in ("checkpoint_minutes", "log_seconds"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"'{name}' of {self.where} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"'seed' of {self.where} is {self.seed}; it must be from 0 to below 2**63")
        every = (self.validation or {}).get("every", 1)
        if not isinstance(every, int) or every < 1:
            raise ConfigError(f"'every' of the validation is {every!r}; it must be a whole number from 1 up")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"'ema' of {self.where} is {self.ema}; it must lie between 0 and 1")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.tokens // self.batch_tokens)


_NESTED = {
    "model": ModelSettings,
    "optimizer": OptimizerSettings,
    "schedule": Schedule,
    "samples": SampleSettings,
}
_PARTS = (*_NESTED, "objective", "validation", "lora")


def read_recipe(path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, `changes` on top (`{"optimizer.lr": 1e-3}`)."""
    path = Path(path)
    where = f"the recipe {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    return recipe_from_dict(parse_yaml(text, where), where=where, folder=path.parent, changes=changes)


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number; by YAML 1.1 it is a text, and only `1.0e-3` a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` stands for; ConfigError with `where` if it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} cannot be read: {' '.join(str(error).split())}") from None


def _change(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put `value` at a dotted `key`; a number in it is a place in a list (`mixture.0.weight`)."""
    spot: Any = raw
    *outer, last = key.split(".")
    for name in outer:
        if isinstance(spot, dict) and spot.get(name) is None:
            spot[name] = {}
        spot = spot[_place(spot, name, key, where)]
    spot[_place(spot, last, key, where)] = value


def _place(spot: Any, name: str, key: str, where: str) -> str | int:
    if isinstance(spot, list):
        if name.isdecimal() and int(name) < len(spot):
            return int(name)
        raise ConfigError(f"there is no {key!r} in {where}: places go from 0 to {len(spot) - 1}")
    if not isinstance(spot, dict):
        raise ConfigError(f"there is no {key!r} in {where}: {spot!r} has no settings of its own")
    return name


def _expand(value: Any, where: str) -> Any:
    """Environment variables put in for `$NAME`, in all strings of nested values; a copy."""
    if isinstance(value, Mapping):
        return {str(key): _expand(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if not isinstance(value, str):
        return value
    expanded = re.sub(r"\$\{?([A-Z_][A-Z0-9_]*)\}?", _variable, value)
    missing = re.search(r"\$\{?([A-Z_][A-Z0-9_]*)", expanded)
    if missing:
        raise ConfigError(f"{where} needs the environment variable {missing[1]}, which is not set")
    return expanded


def _variable(match: re.Match[str]) -> str:
    """An environment variable's value; a path is made absolute, for the recipe may lie elsewhere."""
    value = os.environ.get(match[1])
    if value is None:
        return match[0]
    return str(Path(value).absolute()) if Path(value).exists() else value


def recipe_from_dict(
    raw: Mapping[str, Any],
    where: str = "the recipe",
    folder: Path = Path(),
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """A checked recipe from plain values, `changes` on top (`{"optimizer.lr": 1e-3}`).

    A part that is null is as if it were left out. ConfigError names an unknown, missing or ill-typed setting.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} is no mapping of settings to values")
    names = {f.name for f in dataclasses.fields(Recipe)} - {"where", "folder"}
    values: dict[str, Any] = _expand(raw, where)
    for key, value in (changes or {}).items():
        _change(values, key, _expand(value, where), where)
    values = {k: v for k, v in values.items() if v is not None or k not in _PARTS}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(f"unknown setting {key!r} in {where}.{did_you_mean(key, names)}")
        if key in _PARTS and not isinstance(value, Mapping):
            raise ConfigError(f"{key!r} in {where} is {value!r}; it must be a mapping of settings")
        if key == "mixture" and not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key!r} in {where} is {value!r}; it must be a list of sources")
        if key == "output" and (not isinstance(value, (str, Path)) or not str(value)):
            raise ConfigError(f"{key!r} in {where} is {value!r}; it must be the name of a folder")
    for key, cls in _NESTED.items():
        if key in values:
            values[key] = build_dataclass(cls, values[key], where=f"{key!r} in {where}")
    return build_dataclass(Recipe, values | {"where": where, "folder": folder}, where=where)
