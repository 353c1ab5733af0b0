"""trimtab's loop, transformers' Trainer and TRL's SFTTrainer behind one call: equal texts in equal order.

All of them train the shipped model in float32 by AdamW with a constant rate, one after another in a process.
What differs is what each does by itself; what TRL would switch on beyond that (bfloat16, recomputing
activations) is switched off.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _common import Sample

import trimtab
from trimtab import Model
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source
from trimtab.training.loop import Trainer
from trimtab.training.objectives.lm import LanguageModelling
from trimtab.training.recipe import recipe_from_dict

LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
IGNORED = -100  # the label, in transformers, of a token that has no loss


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained on.

    steps: the segments of each optimiser step, equally many in each.
    rows: segments that go through the others' model at a time.
    longest: tokens of the longest segment there may be; `rows * longest` go through ours at a time.
    """

    steps: list[list[Segment]]
    rows: int
    longest: int

    def first(self, steps: int) -> Job:
        """The same with `steps` steps only."""
        return dataclasses.replace(self, steps=self.steps[:steps])


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    sample: tokens of texts (not padding) and seconds, from the end of the first step to that of the last.
    losses: of each step, in nats a token.
    """

    sample: Sample
    losses: list[float]


def our_trainer(model: Model, steps: Sequence[list[Segment]], **settings: Any) -> Trainer:
    """A `Trainer` whose `train_step` takes the `steps` in turn; `settings` are those of a recipe."""
    optimizer = {"name": "adamw", "lr": LR, "weight_decay": DECAY, "betas": list(BETAS), "clip": CLIP}
    recipe = {
        "output": "unused",
        "model": {"source": "shipped"},
        "mixture": [{"kind": "documents"}],
        "tokens": 10**9,
        "optimizer": optimizer,
        "schedule": {"warmup": 0, "decay": 0},
    }
    trainer = Trainer(recipe_from_dict(recipe | settings), model, _Nothing(), LanguageModelling())
    trainer.batches = _Given(steps)  # type: ignore[assignment]
    return trainer


def ours(job: Job) -> Run:
    """The loop of `trimtab train`, without what it writes to the disk."""
    model = trimtab.load(dtype="float32").train()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # loaded ones are views of the file
        parameter.requires_grad_(True)
    trainer = our_trainer(model, job.steps, micro_batch_tokens=job.rows * job.longest, device="cpu")
    losses, ends = [], []
    for _ in job.steps:
        losses.append(trainer.train_step()["loss"])
        ends.append(time.perf_counter())
    tokens = sum(len(segment) for step in job.steps[1:] for segment in step)
    return Run(Sample(tokens, ends[-1] - ends[0]), losses)


def transformers_trainer(job: Job) -> Run:
    """`transformers.Trainer`; texts of a row-batch are of equal length, so that nothing is padded."""
    from transformers import Trainer as TheirTrainer
    from transformers import TrainingArguments, default_data_collator

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(output_dir=scratch, **_arguments(job))
        return _their_run(TheirTrainer, job, args=arguments, data_collator=default_data_collator)


def trl_trainer(job: Job, packing: bool = False) -> Run:
    """`trl.SFTTrainer`, which pads to the longest text of a row-batch, or packs (best fit, no padding)."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    told = _arguments(job)
    if packing:  # its rows are full ones, so a step has fewer of them
        tokens = sum(len(segment) for step in job.steps for segment in step) / len(job.steps)
        told["gradient_accumulation_steps"] = max(1, round(tokens / (job.rows * job.longest)))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(output_dir=scratch, max_length=job.longest, packing=packing, **told)
        tokenizer = AutoTokenizer.from_pretrained(_folder())
        return _their_run(SFTTrainer, job, args=arguments, processing_class=tokenizer)


class _Nothing(Source):
    """Stands where the loop's own data would."""

    def next(self) -> Segment:
        raise AssertionError("the benchmark hands its segments to the loop itself")

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class _Given:
    """Stands where the loop's prefetched batches would: a step at a time."""

    def __init__(self, steps: Sequence[list[Segment]]) -> None:
        self._steps = iter(steps)

    def next_batch(self) -> tuple[list[Segment], dict[str, Any]]:
        return next(self._steps), {}


def _folder() -> str:
    return str(trimtab.load().path)


def _arguments(job: Job) -> dict[str, Any]:
    """What both of the others' trainers are told."""
    # A new name for `gradient_checkpointing` exists, but it does not undo TRL's default.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return {
        "per_device_train_batch_size": job.rows,
        "gradient_accumulation_steps": len(job.steps[0]) // job.rows,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "gradient_checkpointing": False,  # TRL's default is true
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _their_run(trainer: Any, job: Job, **settings: Any) -> Run:
    """A run of `trainer`, a class of transformers' making, with losses, tokens and times written down."""
    import datasets
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    losses: dict[int, float] = {}
    tokens: dict[int, int] = {}
    ends: list[float] = []

    class Noted(trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> torch.Tensor:
            step, mask = self.state.global_step, inputs.get("attention_mask")
            count = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            loss = super().training_step(model, inputs, *rest, **more)
            losses[step] = losses.get(step, 0.0) + loss.item()
            tokens[step] = tokens.get(step, 0) + count
            return loss

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    rows = [_row(segment) for step in job.steps for segment in step]
    model: Any = AutoModelForCausalLM.from_pretrained(_folder(), dtype=torch.float32)
    made = Noted(model=model, train_dataset=datasets.Dataset.from_list(rows), callbacks=[Clock()], **settings)
    made.remove_callback(PrinterCallback)
    made.train()
    timed = sum(count for step, count in tokens.items() if step > 0)
    return Run(Sample(timed, ends[-1] - ends[0]), [losses[step] for step in sorted(losses)])


def _row(segment: Segment) -> dict[str, list[int]]:
    labels = [int(t) if kept else IGNORED for t, kept in zip(segment.tokens, segment.trained, strict=True)]
    return {"input_ids": segment.tokens.tolist(), "labels": labels}
