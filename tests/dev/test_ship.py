"""A trained model put in its place in the package, on a copy of the place."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

import trimtab
from trimtab.errors import ConfigError
from trimtab.models import hub
from trimtab.models.save import save

MEASURED = {
    "books": {"bits_per_byte": 1.8, "perplexity": 75.0, "tokens": 9000, "books": 2, "window": 2048},
    "skills": {
        "passkey": {"share": 0.5, "stderr": 0.1, "n": 20},
        "json": {"share": 0.25, "stderr": 0.05, "n": 20},
    },
    "passkeys": {"300": {"share": 0.75, "stderr": 0.1, "n": 20}},
    "guesses": {"agreement": 0.52, "acceptance": 0.63},
}


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "dev"))
    return importlib.import_module("ship")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where shipped models lie: an older draft, and the tokenizer of its sibling."""
    shipped = tmp_path / "shipped"
    shutil.copytree(hub.SHIPPED / "draft", shipped / "draft", copy_function=shutil.copyfile)
    (shipped / "draft" / "attachments").mkdir()
    (shipped / "tiny").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(hub.SHIPPED / "tiny" / name, shipped / "tiny" / name)
    monkeypatch.setattr(hub, "SHIPPED", shipped)
    return shipped


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a training run leaves behind: metrics, the recipe and a model, here in float32."""
    run = tmp_path / "run"
    model = trimtab.load("draft", dtype="float32")
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    save(model, run / "model")
    steps = [
        {"step": i, "tokens": 1000 * i, "loss": 5 - i / 9, "lr": 1e-3, "seconds": 60.0 * i}
        for i in range(1, 9)
    ]
    steps[-1]["validation_loss"] = 4.25
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    books = {"name": "books", "kind": "documents", "paths": ["/secret/books"], "weight": 3}
    mixture = [books, {"kind": "skills"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump({"mixture": mixture, "optimizer": {"lr": 1e-3}}))
    return run


def figures(run: Path, folder: Path) -> Path:
    """Figures of the run's model, as `measure_models.py` writes them."""
    file = folder / "figures.json"
    file.write_text(json.dumps({"models": {trimtab.load(run / "model").fingerprint(): MEASURED}}))
    return file


def test_a_model_takes_the_place_of_the_old_one(ship: Any, place: Path, run: Path, tmp_path: Path) -> None:
    ship.ship(run / "model", "draft", figures(run, tmp_path), [run, run])
    model, trained = trimtab.load("draft"), trimtab.load(run / "model").to(torch.bfloat16)
    assert model.path == place / "draft" and model.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name])
    assert not (place / "draft" / "attachments").exists(), "what was fitted for the old one is still there"
    card = (place / "draft" / "README.md").read_text()
    size = f"{model.num_parameters() / 1e6:.2f}M"
    for figure in ("1.800 bits per byte", "0.750 ± 0.100", "0.250 ± 0.050", "0.52", size, "4.250"):
        assert figure in card
    assert "books 75%, skills 25%" in card and "secret" not in card and "$" not in card
    picture = ElementTree.parse(place / "draft" / "curves.svg")
    assert picture.getroot().tag.endswith("svg")
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (place / "draft").iterdir())


def test_figures_of_other_weights_are_refused(ship: Any, place: Path, run: Path, tmp_path: Path) -> None:
    found = figures(run, tmp_path)
    shutil.copyfile(place / "draft" / "model.safetensors", run / "model" / "model.safetensors")
    before = (place / "draft" / "README.md").read_text()
    with pytest.raises(ConfigError, match="has no figures of"):
        ship.ship(run / "model", "draft", found, [run])
    assert (place / "draft" / "README.md").read_text() == before and (
        place / "draft" / "attachments"
    ).exists()


@pytest.mark.parametrize(
    ("name", "file", "says"),
    [
        ("draft", "model/tokenizer.json", "another tokenizer than 'tiny'"),
        ("draft", "metrics.jsonl", "has no metrics.jsonl"),
        ("draft", "recipe.yaml", "has no recipe.yaml"),
        ("drat", "", "there is no card for 'drat'"),
    ],
)
def test_mistakes(ship: Any, place: Path, run: Path, tmp_path: Path, name: str, file: str, says: str) -> None:
    found = figures(run, tmp_path)
    if file == "model/tokenizer.json":
        (run / file).write_text((run / file).read_text() + " ")
    elif file:
        (run / file).unlink()
    with pytest.raises(ConfigError, match=says):
        ship.ship(run / "model", name, found, [run])
    assert sorted(path.name for path in place.iterdir()) == ["draft", "tiny"]


def test_a_model_that_is_too_large(
    ship: Any, place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "MOST_BYTES", 1_000_000)
    with pytest.raises(ConfigError, match="a shipped model has at most 1,000,000"):
        ship.check(trimtab.load(run / "model"), "draft")


def test_every_shipped_model_has_a_text_for_its_card(ship: Any) -> None:
    assert {"tiny", "draft", "chat"} <= {path.stem for path in ship.card.TEMPLATES.glob("*.md")}
