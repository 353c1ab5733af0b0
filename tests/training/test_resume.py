"""A run that is ended at any moment goes on bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.tiny import CONFIG, losses, tiny_trainer
from trimtab.errors import CheckpointError, ConfigError, OutputError
from trimtab.training.keeping import checkpoint
from trimtab.training.loop import Trainer
from trimtab.training.watching.metrics import read_lines

WATCHED = {"validation": {"every": 3}}


class Ended(BaseException):
    """Stands for whatever ends a process in the middle of a step."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert tiny_trainer(output, **WATCHED).train()
    return output


def end_after(trainer: Trainer, saved: tuple[int, ...], ended: int) -> None:
    """Run `trainer`, with checkpoints after the steps `saved`, until it ends within step `ended`."""
    plain = trainer.train_step

    def step():
        if trainer.step in saved:
            trainer.save_checkpoint()
        if trainer.step == ended - 1:
            raise Ended
        return plain()

    trainer.train_step = step  # type: ignore[method-assign]
    with pytest.raises(Ended):
        trainer.train()


def same_model(a: Path, b: Path) -> bool:
    return (a / "model/model.safetensors").read_bytes() == (b / "model/model.safetensors").read_bytes()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, uninterrupted: Path) -> None:
    output = tmp_path / "run"
    end_after(tiny_trainer(output, **WATCHED), saved=(4,), ended=9)
    assert [line[0] for line in losses(output)] == [1, 2, 3, 4, 5, 6, 7, 8]
    with (output / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "lo')  # as a kill may leave it
    again = tiny_trainer(output, **WATCHED)
    assert again.start(resume=True)
    assert again.step == 4
    assert again.train()
    assert losses(output) == losses(uninterrupted)
    assert [r.get("validation_loss") for r in read_lines(output / "metrics.jsonl")] == [
        r.get("validation_loss") for r in read_lines(uninterrupted / "metrics.jsonl")
    ]
    assert same_model(output, uninterrupted)


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9, "optimizer": {"name": "adamw"}},
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_the_same_with_other_settings(tmp_path: Path, changes: dict) -> None:
    tiny_trainer(tmp_path / "whole", tokens=700, **changes).train()
    end_after(tiny_trainer(tmp_path / "run", tokens=700, **changes), saved=(2,), ended=5)
    again = tiny_trainer(tmp_path / "run", tokens=700, **changes)
    again.resume()
    again.train()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same_model(tmp_path / "run", tmp_path / "whole")


def test_without_a_checkpoint_a_run_begins_again(tmp_path: Path, uninterrupted: Path) -> None:
    output = tmp_path / "run"
    end_after(tiny_trainer(output, **WATCHED), saved=(), ended=3)
    again = tiny_trainer(output, **WATCHED)
    said: list[str] = []
    assert not again.start(resume=True, say=said.append)
    assert len(said) == 1 and "begins at its first step" in said[0]
    again.train()
    assert losses(output) == losses(uninterrupted)


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(tmp_path: Path, uninterrupted: Path) -> None:
    output = tmp_path / "run"
    end_after(tiny_trainer(output, **WATCHED), saved=(4, 6), ended=9)
    newest = checkpoint.all_of(output / "checkpoints")[-1]
    with (newest / "tensors.safetensors").open("r+b") as file:
        file.truncate(5000)
    said: list[str] = []
    again = tiny_trainer(output, **WATCHED)
    assert again.start(resume=True, say=said.append)
    assert again.step == 4 and len(said) == 2
    again.train()
    assert losses(output) == losses(uninterrupted)


def test_a_run_may_become_longer_and_a_finished_one_stays(tmp_path: Path) -> None:
    flat = {"schedule": {"warmup": 0, "decay": 0}}
    tiny_trainer(tmp_path / "long", tokens=800, **flat).train()
    tiny_trainer(tmp_path / "run", tokens=500, **flat).train()
    longer = tiny_trainer(tmp_path / "run", tokens=800, **flat)
    assert longer.resume() and longer.step == 5
    longer.train()
    assert losses(tmp_path / "run") == losses(tmp_path / "long")
    before = losses(tmp_path / "run")
    done = tiny_trainer(tmp_path / "run", tokens=800, **flat)
    done.resume()
    assert done.train() and losses(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"optimizer": {"lr": 0.02}}, "'optimizer.lr' of the recipe is 0.02, and was 0.01"),
        ({"seed": 3}, "'seed'"),
        ({"mixture": [{"kind": "counting", "weight": 1}]}, "'mixture'"),
        ({"objective": {"name": "lm", "z_loss": 1e-4}}, "'objective.z_loss'"),
        ({"ema": 0.99}, "'ema'"),
        ({"lora": {"rank": 2, "alpha": 1}}, "'lora.alpha' of the recipe is 1, and was None"),
        ({"model": {"config": CONFIG | {"mlp_bias": True}}}, "'model.config.mlp_bias'"),
    ],
)
def test_a_changed_recipe_is_refused_by_name(tmp_path: Path, changes: dict, name: str) -> None:
    before = {"lora": {"rank": 2}} if "lora" in changes else {}
    trainer = tiny_trainer(tmp_path / "run", **before)
    trainer.save_checkpoint()
    with pytest.raises(ConfigError, match=name):
        tiny_trainer(tmp_path / "run", **changes).resume()
    assert tiny_trainer(tmp_path / "run", **before).resume()  # and the folder is free for the right one


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.frozen = "one"
    trainer.save_checkpoint()
    again = tiny_trainer(tmp_path / "run")
    again.frozen = "two"
    with pytest.raises(ConfigError, match="has other weights than when the run began"):
        again.resume()
    again.frozen = "one"
    assert again.resume()


def test_what_changes_no_step_may_be_changed(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run").save_checkpoint()
    changes = {"keep_checkpoints": 5, "log_seconds": 1, "save_dtype": "bfloat16", "validation": {"every": 7}}
    assert tiny_trainer(tmp_path / "run", activation_checkpointing=True, **changes).resume()


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.save_checkpoint()
    place = checkpoint.all_of(tmp_path / "run/checkpoints")[0]
    tensors, state = checkpoint.read(place)
    del tensors["model.model.norm.weight"]
    checkpoint.write(place.parent, 0, tensors, state, keep=1)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight'.* another model"):
        tiny_trainer(tmp_path / "run").resume()


def test_a_signal_ends_a_run_after_its_step(tmp_path: Path, uninterrupted: Path, capfd) -> None:
    output = tmp_path / "run"
    trainer = tiny_trainer(output, **WATCHED)
    plain = trainer.train_step
    before = signal.getsignal(signal.SIGTERM)

    def step():
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            # A second signal would end the process at once.
            assert signal.getsignal(signal.SIGTERM) == before
        return plain()

    trainer.train_step = step  # type: ignore[method-assign]
    assert trainer.train() is False
    assert trainer.stopped_by == signal.SIGTERM and trainer.step == 7
    assert "--resume" in capfd.readouterr().err
    assert not (output / "model").exists()
    again = tiny_trainer(output, **WATCHED)
    assert again.resume() and again.step == 7
    again.train()
    assert losses(output) == losses(uninterrupted)


def test_a_full_disk_is_told_and_the_last_checkpoint_kept(tmp_path: Path) -> None:
    import resource

    trainer = tiny_trainer(tmp_path / "run", checkpoint_minutes=0)
    plain = trainer.train_step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step():
        if trainer.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return plain()

    trainer.train_step = step  # type: ignore[method-assign]
    try:
        with pytest.raises(OutputError, match=r"could not be written.*the last good one is step-00000004"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = tiny_trainer(tmp_path / "run")
    assert again.resume() and again.step == 4


def test_folders_that_hold_something_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"holds other things \(cat.jpg\)"):
            tiny_trainer(tmp_path / "photos").start(resume)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    tiny_trainer(tmp_path / "run", tokens=100).train()
    kept = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(OutputError, match="holds a run already; resume it"):
        tiny_trainer(tmp_path / "run", tokens=100).train()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == kept
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        tiny_trainer(tmp_path / "file").start()


def test_a_run_killed_as_it_began_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / ".recipe.yaml.tmp").touch()
    tiny_trainer(tmp_path, tokens=100).start()
    assert list(tmp_path.iterdir()) == []


def test_what_is_drawn_depends_on_the_recipes_seed_alone(tmp_path: Path) -> None:
    drawn = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        tiny_trainer(tmp_path / str(number), seed=seed).start()
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[1] != drawn[2]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path / "run", tokens=100)
    first.start()
    with pytest.raises(OutputError, match="another run is writing"):
        tiny_trainer(tmp_path / "run", tokens=100).start()
    first.train()
    assert tiny_trainer(tmp_path / "run", tokens=100).start(resume=True)


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", tokens=100).train()
    for name in ("checkpoints/.step-00000007.abc", ".model.xyz"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "part").touch()
    (tmp_path / "run/.report.html.tmp").touch()
    tiny_trainer(tmp_path / "run", tokens=200).start(resume=True)
    assert not [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(".")]


RUN = """
import sys
import torch
torch.set_num_threads(1)
from training.tiny import tiny_trainer
trainer = tiny_trainer(sys.argv[1], validation={"every": 3}, tokens=int(sys.argv[2]), checkpoint_minutes=1e-4)
trainer.start(resume=True)
trainer.train()
"""


def spawn(output: Path, tokens: int) -> subprocess.Popen:
    tests = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(output), str(tokens)],
        env=os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent / 'src'}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL while steps are computed, metrics logged, checkpoints and reports written: none is noticed."""
    tokens = 20_000
    assert spawn(tmp_path / "whole", tokens).wait() == 0
    rng, output, kills = random.Random(0), tmp_path / "run", 0
    for _ in range(8):
        process = spawn(output, tokens)
        target = len(losses(output)) + rng.randrange(1, 20)
        while process.poll() is None and len(losses(output)) < target:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 5
    assert spawn(output, tokens).wait() == 0
    assert losses(output) == losses(tmp_path / "whole")
    assert same_model(output, tmp_path / "whole")
    assert not list(output.rglob(".*"))
