from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trimtab.attachment import FACTS, TENSORS, Attachment, Attachments, Base
from trimtab.errors import ConfigError, OutputError
from trimtab.models.shapes import random_model, shape
from trimtab.models.transformer import Model

CONFIG = shape(
    "125m",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(CONFIG, seed=1)


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    return made_for(model).save(tmp_path / "thing")


def made_for(model: Model, kind: str = "thing") -> Attachment:
    tensors = {"order": torch.arange(6).view(2, 3), "scale": torch.rand(4, generator=torch.Generator())}
    made = {"data": "notes.txt", "tokens": 100}
    return Attachment(kind, Base.of(model), tensors, {"bits": 2}, made, {"loss": 0.5})


def test_what_is_saved_is_what_is_loaded(model: Model, folder: Path) -> None:
    saved, loaded = made_for(model), Attachment.load(folder)
    assert (loaded.kind, loaded.base, loaded.options) == (saved.kind, saved.base, saved.options)
    assert (loaded.made, loaded.measured, loaded.path) == (saved.made, saved.measured, folder)
    assert torch.equal(loaded.tensor("order", (2, 3), torch.int64), saved.tensors["order"])
    assert {file.name for file in folder.iterdir()} == {TENSORS, FACTS}


def test_an_attachment_is_found_beside_the_model_and_by_path(model: Model, folder: Path) -> None:
    assert Attachments(model).get("thing", str(folder)).path == folder
    model.path = folder.parent / "some-model"
    try:
        with pytest.raises(ConfigError, match=r"trimtab attach thing .*some-model --data FILE --out .*thing"):
            Attachments(model).get("thing")
        made_for(model).save(model.path / "attachments" / "thing")
        assert Attachments(model).get("thing").path == model.path / "attachments" / "thing"
    finally:
        model.path = None


def test_a_model_without_a_folder_has_none(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"no folder to look in.*trimtab attach thing MODEL --data FILE"):
        Attachments(model).get("thing")


def test_the_same_model_in_another_dtype_may_use_it(folder: Path) -> None:
    Attachment.load(folder).check(random_model(CONFIG, seed=1).to(torch.bfloat16))


def test_another_model_may_not(folder: Path) -> None:
    other = random_model(CONFIG, seed=2)
    mine, its = Attachment.load(folder).base, Base.of(other)
    with pytest.raises(ConfigError) as error:
        Attachments(other).get("thing", str(folder))
    assert mine.fingerprint[:12] in str(error.value) and its.fingerprint[:12] in str(error.value)


def test_another_kind_is_refused(model: Model, folder: Path) -> None:
    with pytest.raises(ConfigError, match="of kind 'thing', but 'other' is needed"):
        Attachments(model).get("other", str(folder))


def test_nothing_is_overwritten_unasked(model: Model, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists and is not empty"):
        made_for(model, "new").save(folder)
    assert Attachment.load(folder).kind == "thing"
    made_for(model, "new").save(folder, overwrite=True)
    assert Attachment.load(folder).kind == "new"
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo").write_text("x")
    with pytest.raises(OutputError, match="not an attachment, so it is not replaced"):
        made_for(model).save(tmp_path / "holiday", overwrite=True)
    assert (tmp_path / "holiday" / "photo").read_text() == "x"


def test_a_failed_write_leaves_what_was_there(model: Model, folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    broken = Attachment("thing", Base.of(model), {"x": torch.ones(1)}, made={"size": object()})
    with pytest.raises(TypeError):
        broken.save(folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["thing"], "nor anything beside it"
    readonly = folder.parent / "file"
    readonly.write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        made_for(model).save(readonly / "below")


def change(folder: Path, **entries: object) -> None:
    file = folder / FACTS
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / FACTS).unlink(), "is missing, so .* is not an attachment"),
        (lambda f: (f / FACTS).write_text("{"), "not valid JSON"),
        (lambda f: (f / FACTS).write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda f: (f / FACTS).write_text("[]"), "format None"),
        (lambda f: change(f, format=9), "format 9"),
        (lambda f: change(f, base={}), "no proper entry 'base'"),
        (lambda f: change(f, kind=3), "no proper entry 'kind'"),
        (lambda f: change(f, tensors=[]), "no proper entry 'tensors'"),
        (lambda f: (f / TENSORS).unlink(), "is missing; make the attachment again"),
        (lambda f: (f / TENSORS).write_bytes(b"junk"), "is damaged"),
        (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-3]), "is damaged"),
        (lambda f: save_file({"order": torch.zeros(2, 3).long()}, f / TENSORS), "'scale'.*lacks it"),
        (
            lambda f: save_file({"order": torch.zeros(2, 2), "scale": torch.zeros(4)}, f / TENSORS),
            r"'order' as \['int64', 2, 3\].*holds \['float32', 2, 2\]",
        ),
    ],
)
def test_damage_is_one_clear_sentence(folder: Path, damage, says: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=says) as error:
        Attachment.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_tensors_are_checked_when_asked_for(model: Model) -> None:
    thing = made_for(model)
    with pytest.raises(ConfigError, match="no tensor 'codes'"):
        thing.tensor("codes", (1,), torch.float32)
    with pytest.raises(ConfigError, match=r"is int64 \[2, 3\], not int64 \[3, 3\]"):
        thing.tensor("order", (3, 3), torch.int64)
    with pytest.raises(ConfigError, match=r"is float32 \[4\], not float16 \[4\]"):
        thing.tensor("scale", (4,), torch.float16)
    thing.tensors["scale"][1] = torch.nan
    with pytest.raises(ConfigError, match="not numbers"):
        thing.tensor("scale", (4,), torch.float32)
