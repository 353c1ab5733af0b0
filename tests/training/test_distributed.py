"""Several processes train what one process trains, and go on from each other's checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training.distributed_runs import ALL, FEW, HALF, LABELS, MANY, run
from trimtab.training.data.segments import all_trained
from trimtab.training.distributed.ranks import Ranks, even_groups
from trimtab.training.watching.metrics import read_lines

TESTS = Path(__file__).parents[1]


def test_groups_are_cut_until_they_come_out_even() -> None:
    assert even_groups([["a"], ["b"]], 2) == [["a"], ["b"]]
    assert even_groups([["a"], ["b", "c"], ["d"]], 2) == [["a"], ["b"], ["c"], ["d"]]
    assert even_groups([["a"]], 3) == [["a"], [], []]
    assert even_groups([["a"], ["b"]], 1) == [["a"], ["b"]]


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_every_segment_goes_to_one_process(world: int) -> None:
    segments = [all_trained(np.arange(i, i + 5)) for i in range(10)]
    shares = []
    for rank in range(world):
        ranks = Ranks(torch.device("cpu"))
        ranks.rank, ranks.world = rank, world
        shares.append(ranks.micro_batches(segments, 10))
    assert len({len(share) for share in shares}) == 1
    given = [s for share in shares for micro in share if micro.counts for s in micro.segments]
    assert sorted(s.tokens[0] for s in given) == list(range(10))
    idle = [micro for share in shares for micro in share if not micro.counts]
    assert len(idle) == (6 if world == 16 else 0)
    assert all(micro.batch.trained_tokens > 0 for micro in idle)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, each the other's way on from the middle."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "one", HALF, MANY)
    shutil.copytree(folder / "one", folder / "half")
    run(folder / "one", ALL, MANY)
    run(folder / "one-few", ALL, FEW, tied=False)
    run(folder / "one-labels", ALL, LABELS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]),
        "OMP_NUM_THREADS": "1",
    }
    script = str(TESTS / "training" / "distributed_runs.py")
    done = subprocess.run(
        [*command, script, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    run(folder / "several-half", ALL, MANY)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "other, one",
    [
        pytest.param("several", "one", id="two"),
        pytest.param("half", "one", id="one, then two"),
        pytest.param("several-half", "one", id="two, then one"),
        pytest.param("several-few", "one-few", id="two, sometimes without a text"),
        pytest.param("several-labels", "one-labels", id="two, with an objective's own head"),
    ],
)
def test_losses_are_those_of_one_process(folder: Path, other: str, one: str) -> None:
    expected, found = (read_lines(folder / name / "metrics.jsonl") for name in (one, other))
    assert [m["step"] for m in found] == list(range(1, ALL + 1))
    for name in ("loss", "grad_norm", "tokens", "lr"):
        assert [m[name] for m in found] == pytest.approx([m[name] for m in expected], rel=1e-5), name
    held_out = [m["validation_loss"] for m in found if "validation_loss" in m]
    assert len(held_out) == 2
    assert held_out == pytest.approx(
        [m["validation_loss"] for m in expected if "validation_loss" in m], rel=1e-5
    )


@pytest.mark.slow
def test_several_processes_save_the_whole_model(folder: Path) -> None:
    expected, found = (
        load_file(folder / name / "model" / "model.safetensors") for name in ("one", "several")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_several_processes_write_the_same_samples(folder: Path) -> None:
    expected, found = (read_lines(folder / name / "samples.jsonl") for name in ("one", "several"))
    assert [line["step"] for line in found] == [2, 4, 5, 6, 8, 10]
    assert found == expected
