"""Hub ids: only the needed files are asked for, and each failure is one sentence."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import trimtab
from models.tiny_models import CASES, make
from trimtab.errors import CheckpointError, ConfigError
from trimtab.models.hub import DEFAULT, SHIPPED, find_folder, shipped_names


def answer(status: int) -> Any:
    request = SimpleNamespace(method="GET", url="https://hub.invalid/x")
    return SimpleNamespace(status_code=status, headers={}, request=request, text="", url=request.url)


def test_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make(CASES["llama"], tmp_path)
    asked: dict[str, Any] = {}

    def fake(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    model = trimtab.load("some-owner/Some_Model-1.5", revision="main")
    assert model.path == tmp_path
    assert asked["repo_id"] == "some-owner/Some_Model-1.5" and asked["revision"] == "main"

    def wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])

    needed = "config.json generation_config.json model.safetensors model-00001-of-00002.safetensors"
    needed += " model.safetensors.index.json tokenizer.json tokenizer_config.json special_tokens_map.json"
    needed += " chat_template.jinja"
    assert all(map(wanted, needed.split()))
    useless = "consolidated.safetensors pytorch_model.bin original/model.safetensors README.md model.gguf"
    assert not any(map(wanted, (useless + " onnx/model.onnx consolidated-00001.safetensors").split()))


FAILURES = {
    "gated": (errors.GatedRepoError("no", response=answer(403)), "is gated: accept its terms"),
    "unknown": (errors.RepositoryNotFoundError("no", response=answer(404)), "no such model on the hub"),
    "revision": (errors.RevisionNotFoundError("no", response=answer(404)), "no such revision"),
    "offline": (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
    "not-cached": (errors.LocalEntryNotFoundError("not here"), "the hub cannot be reached"),
    "connection": (ConnectionError("reset"), "the hub cannot be reached"),
    "server": (errors.HfHubHTTPError("502 bad gateway", response=answer(502)), "failed: 502 bad gateway"),
    "disk": (OSError(28, "No space left on device"), "No space left on device"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, expected = FAILURES[name]

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        trimtab.load("owner/name", revision="v1")
    message = str(caught.value)
    assert expected in message and "owner/name" in message and "\n" not in message


def test_really_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the hub library's own offline switch, through its real code."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not in the local cache and the hub cannot be reached"):
        trimtab.load("owner/name-that-is-not-cached")


def test_revision_of_a_local_folder(tmp_path: Path) -> None:
    for path in (tmp_path, None, "draft"):
        with pytest.raises(ConfigError, match="revision is 'main', which has no meaning"):
            trimtab.load(path, revision="main")


def test_shipped_models_have_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert {DEFAULT, "draft"} <= set(shipped_names())
    assert find_folder(None) == SHIPPED / DEFAULT
    for name in shipped_names():
        assert find_folder(name) == SHIPPED / name
    Path("tiny").touch()  # neither a file nor a folder without a model hides one
    Path("draft").mkdir()
    assert (find_folder("tiny"), find_folder("draft")) == (SHIPPED / "tiny", SHIPPED / "draft")
    Path("draft/config.json").touch()
    assert find_folder("draft") == Path("draft")


def test_a_wrong_name_tells_the_shipped_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder 'drat'") as caught:
        trimtab.load("drat")
    assert all(name in str(caught.value) for name in shipped_names())


def test_shipped_models_share_a_tokenizer_and_are_small() -> None:
    vocabulary = (SHIPPED / DEFAULT / "tokenizer.json").read_bytes()
    for name in shipped_names():
        assert (SHIPPED / name / "tokenizer.json").read_bytes() == vocabulary
        assert (SHIPPED / name / "model.safetensors").stat().st_size <= 24e6
        assert trimtab.load(name).dtype == torch.bfloat16
