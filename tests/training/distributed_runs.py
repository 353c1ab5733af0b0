"""Runs of a tiny model, by one process or by several: `torchrun ... distributed_runs.py FOLDER`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from training.tiny import CONFIG, Steps, tiny_recipe
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.engine.engine import Engine
from trimtab.models.config import config_from_dict
from trimtab.models.shapes import random_model
from trimtab.models.transformer import Model
from trimtab.training.data.mixture import Mixture
from trimtab.training.data.segments import Segment
from trimtab.training.loop import Trainer
from trimtab.training.setup import build_objective

HALF, ALL = 5, 10  # steps

# Of these a step has up to a dozen texts in several micro-batches; of `FEW` one or two, so that a process may
# have none. Three layers and odd sizes, so that nothing divides evenly.
MANY: dict[str, Any] = {
    "batch_tokens": 100,
    "ema": 0.9,
    "optimizer": {"lr": 0.01, "name": "muon"},
    "samples": {"prompts": ["3 4 5", "60 61"], "every": 2, "max_tokens": 6},
}
FEW: dict[str, Any] = {
    "batch_tokens": 10,
    "activation_checkpointing": True,
    "optimizer": {"lr": 0.003, "name": "adamw"},
}

LABELS: dict[str, Any] = {
    "batch_tokens": 60,
    "objective": {"name": "classify", "labels": ["a", "b", "c"]},
    "optimizer": {"lr": 0.003, "name": "muon"},
}


class Labelled(Steps):
    """The same texts with a class each."""

    def next(self) -> Segment:
        segment = super().next()
        return Segment(segment.tokens, segment.trained, label=int(segment.tokens[0]) % 3)


def run(output: Path, steps: int, settings: dict[str, Any], tied: bool = True) -> None:
    """Train up to `steps`, from the last checkpoint in `output` if there is one."""
    recipe = tiny_recipe(
        output,
        tokens=steps * settings["batch_tokens"],
        schedule={"warmup": 0, "decay": 0},
        validation={"every": HALF},
        **settings,
    )
    shape = {"vocab_size": 67, "intermediate_size": 45, "num_hidden_layers": 3, "tie_word_embeddings": tied}
    model = random_model(config_from_dict(CONFIG | shape)).train().requires_grad_(True)
    made = Labelled if "objective" in settings else Steps
    source, held_out = Mixture([made(0), made(1)], [3, 1]), made(9)
    trainer = Trainer(recipe, model, source, build_objective(recipe))
    trainer.validation = [held_out.next() for _ in range(7)]
    trainer.generate = count_on
    trainer.start(resume=True)
    trainer.train()


def count_on(model: Model, prompts: list[str]) -> list[str]:
    """What the engine makes of prompts that are numbers of tokens: a tiny one has no tokenizer."""
    tokens = [[int(word) for word in prompt.split()] for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = Engine(model, backend="torch").generate(tokens, params)
    return [" ".join(map(str, output.token_ids)) for output in outputs]


def main() -> None:
    """Every run that several processes make together."""
    folder = Path(sys.argv[1])
    run(folder / "several", HALF, MANY)
    if (folder / "half").is_dir():  # left by one process
        run(folder / "half", ALL, MANY)
    shutil.copytree(folder / "several", folder / "several-half", dirs_exist_ok=True)
    run(folder / "several", ALL, MANY)
    run(folder / "several-few", ALL, FEW, tied=False)
    run(folder / "several-labels", ALL, LABELS)


if __name__ == "__main__":
    main()
