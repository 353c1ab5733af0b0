"""Saving: `transformers` opens the folder and finds the same bits; a failure leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from pathlib import Path

import pytest
import torch

import trimtab
from models.tiny_models import CASES, make, oracle, texts
from trimtab.errors import OutputError
from trimtab.models.save import save
from trimtab.models.shapes import random_model, shape


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CASES))
def test_transformers_reads_the_same_bits(name: str, tmp_path: Path) -> None:
    source = make(CASES[name], tmp_path / "source")
    model = trimtab.load(source)
    saved = save(model, tmp_path / "saved", max_shard_bytes=30_000)
    assert (saved / "model.safetensors.index.json").is_file()
    before, after = oracle(source), oracle(saved)
    weights = after.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in before.state_dict().items())
    ids = texts(model, 1, 20)
    assert torch.equal(before(ids).logits, after(ids).logits)
    again = trimtab.load(saved)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    # Not to the bit: the matrix library sums in another order where a mapped weight is aligned otherwise.
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=1e-5)
    assert again.fingerprint() == model.fingerprint()


def test_config_is_kept_but_for_the_dtype(tmp_path: Path) -> None:
    shipped = trimtab.load().path
    assert shipped is not None
    raw = json.loads((shipped / "config.json").read_text())
    saved = save(trimtab.load(), tmp_path / "same")
    assert json.loads((saved / "config.json").read_text()) == raw
    saved = save(trimtab.load(dtype="float16"), tmp_path / "half")
    assert json.loads((saved / "config.json").read_text()) == raw | {"torch_dtype": "float16"}
    assert trimtab.load(saved).dtype == torch.float16


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    model = trimtab.load()
    saved = save(model, tmp_path / "out")
    again = trimtab.load(saved)
    assert again.tokenizer is not None and model.tokenizer is not None
    assert again.tokenizer.encode("A text, 12.") == model.tokenizer.encode("A text, 12.")
    assert {p.name for p in saved.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert os.access(saved / "tokenizer.json", os.W_OK)


def test_existing_folder(tmp_path: Path) -> None:
    model = random_model(shape("125m", **_TINY))
    target = tmp_path / "out"
    target.mkdir()
    save(model, target)
    with pytest.raises(OutputError, match="exists and is not empty"):
        save(model, target)
    (target / "stale").touch()
    save(random_model(shape("125m", **_TINY), seed=1), target, overwrite=True)
    assert not (target / "stale").exists()
    assert trimtab.load(target).fingerprint() != model.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_saving_over_the_folder_it_is_mapped_from(tmp_path: Path) -> None:
    target = save(random_model(shape("125m", **_TINY)), tmp_path / "out")
    model = trimtab.load(target)
    before = model.fingerprint()
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert trimtab.load(target).fingerprint() == before, "a mapped weight is private to its model"
    save(model, target, overwrite=True)
    assert trimtab.load(target).fingerprint() == model.fingerprint() != before


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk(tmp_path: Path, overwrite: bool) -> None:
    model = random_model(shape("125m", **_TINY))
    target = tmp_path / "out"
    if overwrite:
        save(random_model(shape("125m", **_TINY), seed=1), target)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="could not be written to"):
            save(model, target, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])


def test_a_config_changed_in_python_is_not_written(tmp_path: Path) -> None:
    model = random_model(shape("125m", **_TINY))
    model.config = dataclasses.replace(model.config, rms_norm_eps=0.5)
    with pytest.raises(OutputError, match="does not say what"):
        save(model, tmp_path / "out")


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="could not be written to"):
        save(random_model(shape("125m", **_TINY)), tmp_path / "file" / "out")


_TINY = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)
