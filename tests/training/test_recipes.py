"""Every recipe in `recipes/`, run in miniature: its settings are right, and its parts fit together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
import zstandard

import trimtab
from training.tiny import CONFIG
from trimtab.models.config import config_from_dict
from trimtab.models.save import save
from trimtab.training.recipe import read_recipe
from trimtab.training.starting.initial import initial_model
from trimtab.training.starting.tokenizers.train import TokenizerSettings, train_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
# Those that go on from another's result come after it.
ORDER = ("tiny/1-books", "tiny/2-mix", "tiny/3-anneal", "tiny/4-more", "tiny/5-drill", "tiny/6-end",
         "tiny/7-blend", "tiny/8-last", "draft", "chat", "lora", "continue", "classify", "new-language",
         "long-4x", "long-16x")  # fmt: skip
FAST = ("tiny/1-books", "chat")
PROSE = (
    "It was late when the two men came to the old house by the river. Nobody had lived there for years. "
    "The door stood open, and a cold wind went through the rooms. They lit a lamp and sat down to wait. "
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small data of every kind and a model small enough to grow."""
    folder = tmp_path_factory.mktemp("recipes")
    books = folder / "books"
    for file in (books / "train-00.jsonl.zst", books / "valid.jsonl.zst", folder / "text/train/a.jsonl.zst",
                 folder / "text/valid/a.jsonl.zst"):  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"text": f"Book {i}. {PROSE * 60}"}) + "\n" for i in range(2))
        file.write_bytes(zstandard.compress(lines.encode()))
    labelled = folder / "labelled"
    labelled.mkdir()
    for name in ("train", "valid"):
        rows = [{"text": f"{word} number {i}", "label": word} for i in range(8) for word in ("good", "bad")]
        (labelled / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"vocab_size": 4096, "max_position_embeddings": 2048}
    model = initial_model(config_from_dict(CONFIG | changes), seed=0)
    model.path = trimtab.load().path
    save(model, folder / "small")
    return folder


def test_no_recipe_is_left_out():
    assert sorted(ORDER) == sorted(str(p.relative_to(RECIPES))[:-5] for p in RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in ORDER]
)
def test_a_recipe_runs_in_miniature(place, monkeypatch, name):
    monkeypatch.chdir(place)
    for variable in ("BOOKS", "TEXT", "LABELLED", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(place / variable.lower()))
    if name == "new-language":
        monkeypatch.setenv("NEW_TOKENIZER", str(place / "tokenizer"))
        train_tokenizer([str(place / "text/train")], place / "tokenizer", TokenizerSettings(vocab_size=300))
    monkeypatch.setenv("BASE", str(place / "small"))
    monkeypatch.setenv("DRAFT", str(place / "small"))
    file = RECIPES / f"{name}.yaml"
    raw = yaml.safe_load(file.read_text())
    changes = {"tokens": 600, "batch_tokens": 300, "log_seconds": 1000}
    source = raw["model"]["source"]
    if source == "shipped" or (source.startswith("runs/") and not Path(source).exists()):
        changes["model.source"] = str(place / "small")
    if "blend" in raw["model"]:  # the other model may be another worker's, and grown
        changes["model.blend"] = changes.get("model.source", source)
    if "layers" in raw["model"]:
        changes |= {"model.layers": 3, "model.intermediate_size": 80}
    changes["mixture"] = [_small(mix) for mix in raw["mixture"]]
    changes["validation"] = _small(raw["validation"]) | {"windows": 2}
    recipe = read_recipe(file, changes)
    shutil.rmtree(recipe.output, ignore_errors=True)
    done = trimtab.train(recipe)
    assert done.finished and done.steps == 2 and done.tokens >= 600
    lines = [json.loads(line) for line in (done.output / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation_loss"] > 0
    tokenizer = trimtab.load(done.model).tokenizer
    assert tokenizer is not None
    assert tokenizer.vocab_size == (300 if name == "new-language" else 4096)


def _small(source: dict) -> dict:
    """Windows and conversations that fit a miniature."""
    small = dict(source)
    if "window" in small:
        small["window"] = 64
    if small["kind"] == "skills":
        small["skills"] = {"arithmetic": 1, "json": 1}
        small.pop("world", None)
    return small
