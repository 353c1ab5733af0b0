"""What changes as a model is trained, as named tensors: weights, optimisers, average, random numbers."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.errors import CheckpointError
from trimtab.training.distributed.sharded import cut
from trimtab.training.optimizers.build import load_state_tensors, state_tensors
from trimtab.training.optimizers.ema import Ema


class TrainingState:
    """`tensors()` goes into a checkpoint, `load` takes it back; frozen weights are the recipe's and stay out.

    Names: `model.<parameter>`, `optimizer.<parameter>.<what>`, `ema.<parameter>`, `rng`, `rng.cuda`.
    """

    def __init__(self, module: nn.Module, optimizers: list[torch.optim.Optimizer], ema: Ema | None) -> None:
        self.module, self.optimizers, self.ema = module, optimizers, ema
        self.trained = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything, not copied; sharded as the parameters are."""
        found: dict[str, torch.Tensor] = {f"model.{name}": p for name, p in self.trained.items()}
        found |= state_tensors(self.module, self.optimizers) | {"rng": torch.get_rng_state()}
        if self.ema is not None:
            found |= self.ema.tensors()
        if torch.cuda.is_initialized():
            found["rng.cuda"] = torch.cuda.get_rng_state()
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave, whole tensors; CheckpointError where it is of another model."""
        for name, parameter in self.trained.items():
            kept = tensors.get(f"model.{name}")
            if kept is None or kept.shape != parameter.shape:
                found = "nothing" if kept is None else f"shape {tuple(kept.shape)}"
                raise CheckpointError(
                    f"the checkpoint has {found} for {name!r} of shape {tuple(parameter.shape)}: it is of "
                    "another model; begin a new run in another output folder"
                )
            parameter.copy_(cut(kept.to(parameter.device), parameter))
        load_state_tensors(self.module, self.optimizers, tensors)
        if self.ema is not None:
            self.ema.load(tensors)
        torch.set_rng_state(tensors["rng"])
        if "rng.cuda" in tensors and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
