"""Checkpoints are whole or absent, and a damaged one is noticed."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest
import torch

from trimtab.errors import CheckpointError, OutputError
from trimtab.training.keeping import checkpoint

TENSORS = {"a": torch.arange(3000.0), "b": torch.tensor(7)}


def write(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        checkpoint.write(folder, step, TENSORS, {"step": step}, keep)


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.all_of(folder)]


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_what_is_written_is_read_and_the_last_few_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names(tmp_path)
    tensors, state = checkpoint.read(tmp_path / "step-00000003")
    assert state["step"] == 3
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)


def test_sha256sum_can_read_the_sums(tmp_path: Path) -> None:
    write(tmp_path, 1)
    run = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "step-00000001", capture_output=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "SHA256SUMS"])
def test_one_changed_bit_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path, file: str) -> None:
    write(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / file)
    said: list[str] = []
    found = checkpoint.read_last(tmp_path, said.append)
    assert found is not None and found[2]["step"] == 1
    assert len(said) == 1 and "step-00000002 is damaged" in said[0] and "step-00000001" in said[0]
    assert "\n" not in said[0]
    # It is put aside, so that it is neither taken for the newest nor kept in a good one's stead.
    assert names(tmp_path) == ["step-00000001"]
    assert (tmp_path / "step-00000002.damaged" / file).exists()


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "SHA256SUMS"])
def test_a_missing_file_is_damage(tmp_path: Path, file: str) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001" / file).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(tmp_path / "step-00000001")


def test_where_all_are_damaged_nothing_is_touched(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for name in names(tmp_path):
        damage(tmp_path / name / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        checkpoint.read_last(tmp_path, print)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_checkpoints_of_the_first_format_are_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001" / "SHA256SUMS").unlink()
    (tmp_path / "step-00000001" / "state.json").write_text('{"step": 1}\n')
    assert checkpoint.read(tmp_path / "step-00000001")[1] == {"step": 1}


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow beyond: writing really fails
    try:
        with pytest.raises(OutputError, match="the checkpoint could not be written"):
            write(tmp_path, 3, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert checkpoint.read(tmp_path / "step-00000002")[1]["step"] == 2
