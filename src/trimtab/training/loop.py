"""The training loop: one for pretraining, fine-tuning and context extension."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.errors import ConfigError, NumericsError, OutputError
from trimtab.kernels.training.memory import keep_freed_memory
from trimtab.models.save import save
from trimtab.models.transformer import Model
from trimtab.training.computing import autocast, choose_device, prepare_layers
from trimtab.training.data.batch import Batch
from trimtab.training.data.prefetch import Prefetched
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source
from trimtab.training.distributed.ranks import Ranks
from trimtab.training.keeping import checkpoint, resuming
from trimtab.training.keeping.failures import not_finite
from trimtab.training.keeping.folder import RunFolder
from trimtab.training.keeping.signals import StopSignals
from trimtab.training.keeping.state import TrainingState
from trimtab.training.objectives.base import Objective
from trimtab.training.optimizers.build import build_optimizers
from trimtab.training.optimizers.ema import Ema
from trimtab.training.recipe import Recipe
from trimtab.training.watching.held_out import Generate, as_used, held_out_totals, validation_metrics
from trimtab.training.watching.logs import RunLogs
from trimtab.training.watching.progress import Progress
from trimtab.training.watching.report.write import write_report
from trimtab.training.watching.speed import peak_flops, training_flops


class Trainer:
    """One run of a recipe: `start`, then `train`.

    Attributes:
        module: the model, or `model` and `extra` where the objective trains parameters of its own.
        step: optimiser steps done.
        tokens: tokens seen, all of a segment counted.
        validation, validation_bytes: held-out segments, and the bytes of their text (for bits per byte).
        generate: goes on with the prompts of the recipe's `samples`.
        frozen: fingerprint of the weights below an adapter, for a run to go on with the same ones; or None.
        export: writes the trained model to a folder; default: a Hugging Face folder in `save_dtype`.
        stopped_by: the signal that ended `train`, or None.
    """

    def __init__(self, recipe: Recipe, model: Model, source: Source, objective: Objective) -> None:
        self.recipe, self.model, self.source, self.objective = recipe, model, source, objective
        self.validation: Sequence[Segment] = ()
        self.validation_bytes: int | None = None
        self.generate: Generate | None = None
        self.frozen: str | None = None
        self.export: Callable[[Model, Path], Any] | None = None
        self.output = Path(recipe.output)
        self.folder = RunFolder(self.output)
        self.ranks = Ranks(choose_device(recipe.device))
        self.device = self.ranks.device
        extra = objective.extra_modules(model)
        self.module: nn.Module = model if extra is None else nn.ModuleDict({"model": model, "extra": extra})
        prepare_layers(model, recipe)
        self.ranks.shard(model, *([] if extra is None else [extra]))
        self.module.to(self.device)
        self.optimizers = build_optimizers(self.module, recipe.optimizer)
        self.ema = None if recipe.ema is None else Ema(self.module, recipe.ema)
        self.state = TrainingState(self.module, self.optimizers, self.ema)
        self.batches = Prefetched(source, recipe.batch_tokens)
        self.data_state = source.state()  # after the last batch that was trained on
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.stopped_by: int | None = None
        self._started, self._saved, self._peak = False, -1, math.inf

    def start(self, resume: bool = False, say: Callable[[str], None] = print) -> bool:
        """Take the output folder, and go on from its last whole checkpoint where there is one and `resume`.

        True where one was found. `say` is told of damaged ones. OutputError where the folder holds other
        things or another run writes to it; ConfigError where the recipe is not the checkpoint's any more.
        """
        if self.ranks.is_first:
            self.folder.check(resume)
            self.folder.lock()
            self.folder.sweep()
        self._started = True
        try:
            return self._go_on(say) if resume else self._begin()
        except BaseException:
            self.folder.unlock()
            raise

    def _begin(self) -> bool:
        # Each process draws its own, as its texts are its own.
        torch.manual_seed(self.recipe.seed + self.ranks.rank)
        return False

    def _go_on(self, say: Callable[[str], None]) -> bool:
        with self.ranks.first_goes_first():  # it puts a damaged checkpoint aside
            found = checkpoint.read_last(self.folder.checkpoints, say)
        if found is None:
            say(f"there is no checkpoint in {self.folder.checkpoints}; the run begins at its first step")
            return self._begin()
        _, tensors, state = found
        resuming.check_same(state.get("recipe", {}), self.recipe)
        if state.get("frozen") not in (None, self.frozen):
            raise ConfigError(
                f"the model of {self.recipe.where} has other weights than when the run began, and the run "
                "trains an adapter for those; put them back, or begin a new run in another output folder"
            )
        self.state.load(tensors)
        self.source.restore(state["source"])
        self.data_state = state["source"]
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        say(f"going on from step {self.step:,} of {self.recipe.steps:,}")
        self._saved = self.step
        return True

    def resume(self) -> bool:
        """`start(resume=True)`."""
        return self.start(resume=True)

    def save_checkpoint(self) -> None:
        """Everything that `start` needs to go on; OutputError, with the older ones as they were."""
        if self._saved == self.step:
            return
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "source": self.data_state,
            "frozen": self.frozen,
            "recipe": resuming.settings_of(self.recipe),
        }
        place = self.folder.checkpoints
        tensors = self.ranks.gather(self.state.tensors())
        try:
            if self.ranks.is_first:
                checkpoint.write(place, self.step, tensors, state, self.recipe.keep_checkpoints)
        except OutputError as error:
            last = [path.name for path in checkpoint.all_of(place)][-1:]
            raise OutputError(f"{error}; the last good one is {last[0] if last else 'missing'}") from None
        self._saved = self.step

    def train(self) -> bool:
        """All steps that are left, then the model in `model/`; False where a signal came first.

        The model is then what was exported: in `save_dtype`, and the average where the recipe has `ema`.
        """
        if not self._started:
            self.start()
        if self.recipe.samples is not None and self.generate is None:
            raise ConfigError("the recipe asks for samples, but the Trainer was given no `generate`")
        with ExitStack() as stack:
            stack.callback(self.folder.unlock)
            stack.callback(self.batches.close)
            self._started = False
            keep_freed_memory()
            peak = peak_flops(self.device, getattr(torch, self.recipe.precision))
            self._peak = peak * self.ranks.world
            logs, progress = None, None
            if self.ranks.is_first:
                logs = stack.enter_context(RunLogs(self.folder, self.step, self.recipe.tensorboard))
                resuming.write_settings(self.folder.recipe, self.recipe)
                progress = Progress(self.recipe.steps, self.recipe.log_seconds)
                stack.enter_context(progress)
            stop = stack.enter_context(StopSignals())
            self._steps(stop, progress, logs)
            if self.step < self.recipe.steps:
                self.stopped_by = stop.received or signal.SIGTERM
                name = signal.Signals(self.stopped_by).name
                if progress is not None:
                    progress.say(f"stopped by {name}; step {self.step} is kept, go on from it with --resume")
                return False
            self._export()
        return True

    def _steps(self, stop: StopSignals, progress: Progress | None, logs: RunLogs | None) -> None:
        """Steps up to the last or to a signal, with what is written as they go on."""
        last_save, stopping = time.monotonic(), False
        while self.step < self.recipe.steps and not stopping:
            metrics = self.train_step()
            if self.validation and self._is_turn((self.recipe.validation or {}).get("every", 500)):
                metrics |= self._validate()
            if self.recipe.samples is not None and self._is_turn(self.recipe.samples.every):
                prompts = list(self.recipe.samples.prompts)
                texts = self._generate(prompts)
                if logs is not None:
                    logs.add_samples(self.step, prompts, texts)
            if logs is not None and progress is not None:
                logs.add(metrics)
                progress.update(metrics)
            due = time.monotonic() - last_save >= 60 * self.recipe.checkpoint_minutes
            due, stopping = self.ranks.any(due, stop.received is not None)
            if due or stopping or self.step == self.recipe.steps:
                if logs is not None:
                    logs.flush()
                self.save_checkpoint()
                if self.ranks.is_first:
                    write_report(
                        self.folder,
                        self.recipe,
                        self.model,
                        self.source,
                        self.data_state,
                        self.objective.unit,
                    )
                last_save = time.monotonic()

    def _is_turn(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.steps

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; its metrics. NumericsError where loss or gradient are no numbers."""
        recipe, start = self.recipe, time.perf_counter()
        segments, data_state = self.batches.next_batch()
        lengths = [len(segment) for segment in segments]
        loss = self._backward(segments)
        largest = recipe.optimizer.clip or math.inf
        norm = self.ranks.clip(self.state.trained.values(), largest)
        if not math.isfinite(norm):
            raise self._failure(f"the norm of the gradient is {norm}", segments)
        lr = recipe.optimizer.lr * recipe.schedule.factor(self.step, recipe.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += sum(lengths)
        self.data_state = data_state
        if self.ema is not None:
            self.ema.update(self.step)
        took = time.perf_counter() - start
        self.seconds += took
        rate = training_flops(self.model, self.module, lengths) / took
        self._peak = max(self._peak, rate)  # it was taken while the machine was busy with something else
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens_per_second": sum(lengths) / took,
            "flops_per_second": rate,
            "flops_share": rate / self._peak,
            "seconds": self.seconds,
        }

    def _backward(self, segments: Sequence[Segment]) -> float:
        """Gradients of the mean loss over the units of all `segments`, a micro-batch at a time; that loss."""
        micro_batches = self.ranks.micro_batches(segments, self.recipe.micro_batch_tokens)
        own = sum(self.objective.units(micro.batch) for micro in micro_batches if micro.counts)
        (units,) = self.ranks.all_sum(own)
        if units == 0:
            raise ConfigError(f"step {self.step + 1} has no token to learn from; check the masks of the data")
        total = 0.0
        for micro in micro_batches:
            loss = self._loss(micro.batch) / units if micro.counts else 0 * self._loss(micro.batch)
            value = loss.item()
            if not math.isfinite(value) and self.ranks.world == 1:
                raise self._failure(f"the loss is {value}", micro.segments)
            loss.backward()
            total += value
        (total,) = self.ranks.all_sum(total)
        if not math.isfinite(total):  # all processes get here together
            raise self._failure(f"the loss is {total}", segments)
        return total

    def _loss(self, batch: Batch) -> torch.Tensor:
        with autocast(self.recipe, self.device):
            return self.objective.loss_sum(self.model, batch)

    def _held_out(self, batch: Batch) -> dict[str, torch.Tensor]:
        with autocast(self.recipe, self.device):
            return self.objective.held_out_sums(self.model, batch)

    def _failure(self, what: str, segments: Sequence[Segment]) -> NumericsError:
        folder = self.folder.failures if self.ranks.is_first else None
        return not_finite(what, self.step + 1, segments, folder, self.model.tokenizer)

    def validate(self) -> float:
        """Mean loss in nats over the validation segments, of the averaged weights where there are any."""
        return self._validate()["validation_loss"]

    def _validate(self) -> dict[str, Any]:
        with self.ema.in_place() if self.ema else nullcontext(), as_used(self.module):
            micro_batches = self.ranks.micro_batches(self.validation, self.recipe.micro_batch_tokens)
            found = held_out_totals(micro_batches, self._held_out, self.objective.units)
            totals = dict(zip(found, self.ranks.all_sum(*found.values()), strict=True))
            self.ranks.reshard(self.module)
        return validation_metrics(totals, self.validation_bytes)

    def _generate(self, prompts: list[str]) -> list[str]:
        assert self.generate is not None
        with self.ema.in_place() if self.ema else nullcontext(), as_used(self.module):
            texts = self.generate(self.model, prompts)
            self.ranks.reshard(self.module)
            return texts

    def _export(self) -> None:
        if self.ema is not None:
            self.ema.swap()
        self.ranks.unshard(self.module)
        if not self.ranks.is_first:
            return
        if self.export is not None:
            self.export(self.model, self.folder.model)
        else:
            save(self.model.to(getattr(torch, self.recipe.save_dtype)), self.folder.model, overwrite=True)
        self.objective.save_extra(self.folder.model, self.model)
