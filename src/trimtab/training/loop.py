"""The training loop: one for pretraining, fine-tuning and context extension."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import NumericsError
from trimtab.models.save import save
from trimtab.models.transformer import Model
from trimtab.training import checkpoint
from trimtab.training.data.batch import pack, split
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source
from trimtab.training.objectives.base import Objective
from trimtab.training.optimizers.build import build_optimizers, load_state_tensors, state_tensors
from trimtab.training.recipe import Recipe


class Trainer:
    """One run of a recipe.

    Attributes:
        step: optimiser steps done.
        tokens: tokens seen, all of a segment counted.
    """

    def __init__(self, recipe: Recipe, model: Model, source: Source, objective: Objective) -> None:
        self.recipe, self.model, self.source, self.objective = recipe, model, source, objective
        self.output = Path(recipe.output)
        self.optimizers = build_optimizers(model, recipe.optimizer)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.validation: list[Segment] = []

    def resume(self) -> bool:
        """Go on from the last checkpoint, if there is one."""
        found = checkpoint.all_of(self.output / "checkpoints")
        if not found:
            return False
        tensors, state = checkpoint.read(found[-1])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        load_state_tensors(self.model, self.optimizers, tensors)
        torch.set_rng_state(tensors["rng"])
        self.source.restore(state["source"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        return True

    def save_checkpoint(self) -> None:
        """Everything that `resume` needs."""
        tensors = {f"model.{n}": p for n, p in self.model.named_parameters()}
        tensors |= state_tensors(self.model, self.optimizers) | {"rng": torch.get_rng_state()}
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "source": self.source.state(),
        }
        checkpoint.write(
            self.output / "checkpoints", self.step, tensors, state, self.recipe.keep_checkpoints
        )

    def train(self) -> None:
        """All steps that are left; then the model in `output/model`."""
        recipe = self.recipe
        last_save = time.monotonic()
        with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as log:
            while self.step < recipe.steps:
                metrics = self.train_step()
                if self.validation and (
                    self.step % recipe.validation["every"] == 0 or self.step == recipe.steps
                ):
                    metrics["validation_loss"] = self.validate()
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                if time.monotonic() - last_save > 60 * recipe.checkpoint_minutes:
                    self.save_checkpoint()
                    last_save = time.monotonic()
        self.save_checkpoint()
        dtype = getattr(torch, recipe.save_dtype)
        save(self.model.to(dtype), self.output / "model", overwrite=True)

    def train_step(self) -> dict[str, Any]:
        """One optimiser step."""
        recipe, start = self.recipe, time.perf_counter()
        segments: list[Segment] = []
        held = 0
        while held < recipe.batch_tokens:
            segments.append(self.source.next())
            held += len(segments[-1])
        batches = [pack(group) for group in split(segments, recipe.micro_batch_tokens)]
        units = sum(self.objective.units(batch) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.objective.loss_sum(self.model, batch) / units
            loss.backward()
            total += loss.item()
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip or math.inf)
        )
        if not math.isfinite(total) or not math.isfinite(norm):
            raise NumericsError(f"the loss of step {self.step} is {total} and the gradient's norm {norm}")
        factor = recipe.schedule.factor(self.step, recipe.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.optimizer.lr * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += held
        took = time.perf_counter() - start
        self.seconds += took
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": total,
            "grad_norm": norm,
            "lr": recipe.optimizer.lr * factor,
            "tokens_per_second": held / took,
            "seconds": self.seconds,
        }

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats over the validation segments."""
        total, units = 0.0, 0
        for group in split(self.validation, self.recipe.micro_batch_tokens):
            batch = pack(group)
            total += self.objective.loss_sum(self.model, batch).item()
            units += self.objective.units(batch)
        return total / units
