from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import trimtab
from trimtab.calibration.fitting import data as module
from trimtab.calibration.fitting.data import Sequences, read_sequences
from trimtab.errors import ConfigError
from trimtab.models.shapes import random_model, shape
from trimtab.models.transformer import Model

WORDS = " ".join(f"word{i}" for i in range(4000))


@pytest.fixture(scope="module")
def model() -> Model:
    return trimtab.load()


@pytest.fixture(scope="module")
def nameless() -> Model:
    """Without a tokenizer."""
    return random_model(
        shape(
            "125m",
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_hidden_layers=1,
            vocab_size=50,
        )
    )


def read(model: Model, path: Path | str, count: int = 3, length: int = 20, seed: int = 0) -> Sequences:
    return read_sequences(str(path), model, count=count, length=length, seed=seed)


def lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_one_text_from_each_part_by_seed(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text(WORDS)
    found = read(model, file)
    assert found.tokens.shape == (3, 20) and found.name == "words.txt" and len(found.sha256) == 64
    assert torch.equal(found.tokens, read(model, file).tokens)
    assert not torch.equal(found.tokens, read(model, file, seed=1).tokens)
    assert model.tokenizer is not None
    for i, row in enumerate(found.tokens.tolist()):
        text = model.tokenizer.decode(row)
        assert text.strip()[:40] in WORDS and text.lstrip().startswith("word"), "no half words"
        place = WORDS.index(text.strip()[:40]) / len(WORDS)
        assert i / 3 <= place < (i + 1) / 3


def test_every_form_of_file_gives_the_same(model: Model, tmp_path: Path) -> None:
    plain = lines(tmp_path / "a.jsonl", {"text": WORDS[:9000]}, {"text": WORDS[9000:]})
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    wanted = read(model, plain).tokens
    assert torch.equal(read(model, tmp_path / "a.jsonl.gz").tokens, wanted)
    if shutil.which("zstd"):
        subprocess.run(["zstd", "-q", str(plain)], check=True)
        assert torch.equal(read(model, f"{plain}.zst").tokens, wanted)


def test_the_shipped_text_serves(model: Model) -> None:
    assert read(model, "shipped", count=2, length=100).tokens.shape == (2, 100)


def test_token_ids_need_no_tokenizer(nameless: Model, tmp_path: Path) -> None:
    file = lines(tmp_path / "t.jsonl", {"tokens": list(range(30))}, {"tokens": list(range(30, 50))})
    found = read(nameless, file, count=2, length=25)
    assert found.tokens.tolist() == [list(range(25)), list(range(25, 50))]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("short.txt", b"Only a few words.", "too short: one of its 3 parts has"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("latin.txt", b"caf\xe9 " * 500, "is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text', "line 2 of .* is not valid JSON"),
        ("other.jsonl", b'{"body": "a"}', "line 1 of .* has neither"),
        ("list.jsonl", b'["a"]', "line 1 of .* has neither"),
        ("floats.jsonl", b'{"tokens": [1, 2.5]}', "line 1 of .* has neither"),
        ("both.jsonl", b'{"text": "a"}\n{"tokens": [1]}', "mixes lines"),
        ("foreign.jsonl", b'{"tokens": [1, 4096]}', "token id 4096, but this model's vocabulary is of 4096"),
        ("negative.jsonl", b'{"tokens": [1, -1]}', "token id -1, but"),
        ("broken.txt.gz", b"no gzip", "cannot be read"),
        ("broken.txt.zst", b"no zstd", "cannot be read|needs the program zstd"),
    ],
)
def test_data_that_cannot_serve(model: Model, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says) as error:
        read(model, tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_or_program_or_tokenizer(
    model: Model, nameless: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read(model, tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(model, tmp_path)
    with pytest.raises(ConfigError, match=r"no tokenizer; give .* a list \"tokens\""):
        read(nameless, "shipped")
    (tmp_path / "a.txt.zst").write_bytes(b"")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs the program zstd; install it or unpack the file"):
        read(model, tmp_path / "a.txt.zst")
