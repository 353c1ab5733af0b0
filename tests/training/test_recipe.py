"""Recipes: what they say is checked, and what they leave out is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.tiny import CONFIG
from trimtab.errors import ConfigError, OutputError
from trimtab.models.checkpoint import load
from trimtab.models.config import config_from_dict
from trimtab.training.api import train
from trimtab.training.keeping.resuming import settings_of, write_settings
from trimtab.training.optimizers.schedule import Schedule
from trimtab.training.recipe import ModelSettings, read_recipe, recipe_from_dict
from trimtab.training.setup import with_context
from trimtab.training.starting.initial import initial_model
from trimtab.training.watching.samples import check_prompts

PLAIN = {"output": "out", "model": {"source": "shipped"}, "mixture": [{"kind": "documents"}], "tokens": 1000}


def test_changes_go_over_the_file_and_numbers_may_be_written_short(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("output: out\nmodel: {source: shipped}\nmixture: [{kind: documents}]\ntokens: 1_000_000\n"
                    "optimizer: {name: adamw, lr: 2e-3}\n")  # fmt: skip
    recipe = read_recipe(file, {"optimizer.lr": 1e-4, "schedule.warmup": 5})
    assert recipe.tokens == 1_000_000
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("adamw", 1e-4)
    assert recipe.schedule == Schedule(warmup=5)
    assert recipe.folder == tmp_path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokns": 5}, "unknown setting 'tokns'.*'tokens'"),
        ({"optimizer": {"lrr": 1}}, "unknown option 'lrr' of 'optimizer'.*'lr'"),
        ({"optimizer": {"name": "sgd"}}, "'sgd'.*muon, adamw"),
        ({"optimizer": {"lr": 0}}, "'lr'.*0.*above 0"),
        ({"optimizer": {"betas": [0.9]}}, "'betas'.*two numbers"),
        ({"model": {}}, "either 'source' or 'config'"),
        ({"model": "shipped"}, "'model'.*must be a mapping"),
        ({"mixture": "books"}, "'mixture'.*'books'"),
        ({"schedule": {"final": 2}}, "'final'.*2"),
        ({"tokens": "many"}, "'tokens'.*'many'.*whole number"),
        ({"tokens": 0}, "'tokens'.*0.*at least 1"),
        ({"window": 0}, "'window'.*0.*at least 1"),
        ({"seed": -1}, "'seed'.*-1.*from 0"),
        ({"checkpoint_minutes": -1}, "'checkpoint_minutes'.*-1.*0 or more"),
        ({"save_dtype": "int8"}, "'save_dtype'.*'int8'.*float32, bfloat16, float16"),
        ({"optimizer": {"clip": -1}}, "'clip'.*-1.*above 0"),
        ({"optimizer": {"weight_decay": -1}}, "'weight_decay'.*-1.*from 0 up"),
        ({"model": {"config": 5}}, "'config'.*5.*mapping"),
        ({"validation": [1]}, r"'validation'.*\[1\].*mapping"),
        ({"validation": {"kind": "documents", "every": 0}}, "'every' of the validation is 0"),
        ({"objective": "lm"}, "'objective'.*'lm'.*mapping"),
        ({"lora": []}, r"'lora'.*\[\].*mapping"),
        ({"mixture": None}, "'mixture'.*None.*list of sources"),
        ({"output": None}, "'output'.*None.*folder"),
        ({1: 2}, "unknown setting '1'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named):
        recipe_from_dict(PLAIN | changes)


def test_a_setting_that_is_needed_is_asked_for():
    with pytest.raises(ConfigError, match="needs the option 'tokens'"):
        recipe_from_dict({k: v for k, v in PLAIN.items() if k != "tokens"})


def test_environment_variables_stand_for_their_values(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text("output: $RUNS/a\nmodel: {source: shipped}\ntokens: 1\n"
                    "mixture: [{kind: documents, paths: [$TEXTS/*.txt]}]\n")  # fmt: skip
    monkeypatch.setenv("RUNS", "somewhere")
    with pytest.raises(ConfigError, match="environment variable TEXTS"):
        read_recipe(file)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    monkeypatch.setenv("TEXTS", "texts")
    recipe = read_recipe(file)
    assert recipe.output == "somewhere/a"
    # A path that is there is found from wherever the recipe lies.
    assert recipe.mixture[0]["paths"] == [f"{tmp_path / 'texts'}/*.txt"]


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_a_file_that_is_no_recipe_is_told_in_one_line(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml") as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no recipe at nowhere\.yaml"):
        read_recipe(Path("nowhere.yaml"))


def test_a_number_with_an_exponent_is_a_number_wherever_it_stands(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "output: out\nmodel: {source: shipped}\ntokens: 2e6\nmixture: [{kind: documents, weight: 5e-1}]\n"
    )
    recipe = read_recipe(file)
    assert (recipe.tokens, recipe.mixture[0]["weight"]) == (2_000_000, 0.5)


def test_changes_reach_into_lists_and_mappings():
    raw = PLAIN | {"samples": None}
    recipe = recipe_from_dict(raw, changes={"mixture.0.weight": 2, "samples.prompts": ["a"]})
    assert recipe.mixture[0] == {"kind": "documents", "weight": 2}
    assert recipe.samples is not None and recipe.samples.prompts == ("a",)
    assert raw["mixture"] == [{"kind": "documents"}]  # the caller's own is left alone
    for key in ("mixture.1.weight", "mixture.books.weight", "tokens.x", "mixture.0.kind.x"):
        with pytest.raises(ConfigError, match=f"there is no '{key}' in the recipe"):
            recipe_from_dict(PLAIN, changes={key: 1})


def test_what_a_run_writes_down_can_be_run_again(tmp_path):
    first = recipe_from_dict(PLAIN)
    write_settings(tmp_path / "recipe.yaml", first)
    again = read_recipe(tmp_path / "recipe.yaml")
    assert settings_of(again) == settings_of(first)


def test_what_is_in_the_way_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    nothing = PLAIN | {"model": {"source": "/nowhere"}}
    with pytest.raises(OutputError, match="is a file"):
        train(nothing | {"output": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match="device is 'gpu'"):
        train(nothing, changes={"device": "gpu", "output": str(tmp_path / "new")})
    with pytest.raises(ConfigError, match="made already"):
        train(recipe_from_dict(PLAIN), changes={"tokens": 5})


def test_a_prompt_longer_than_the_context_is_refused():
    model = load()
    check_prompts(model, ["Once upon a time"])
    with pytest.raises(ConfigError, match=r"'It was It.* of the samples has \d+ tokens"):
        check_prompts(model, ["It was " * model.config.context_length])


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_another_rope_base_is_taken_where_the_config_keeps_it(key):
    inner = {"rope_type": "default", "rope_theta": 10_000.0}
    raw = {k: v for k, v in CONFIG.items() if k != "rope_theta"} | {key: inner}
    model = initial_model(config_from_dict(raw), seed=0)
    longer = with_context(model, ModelSettings(source="shipped", rope_theta=1e6, context=512))
    assert (longer.config.rope.theta, longer.config.context_length) == (1e6, 512)
    assert inner["rope_theta"] == 10_000.0
