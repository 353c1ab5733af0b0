"""The optimisers of a recipe, and their state as named tensors."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.training.distributed.sharded import cut
from trimtab.training.optimizers.muon import Muon
from trimtab.training.recipe import OptimizerSettings

# No map between hidden states: lookups, the head, and what an objective trains beside the model.
_TABLES = ("embed_tokens", "lm_head", "extra.")


def build_optimizers(module: nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices (where asked) and AdamW for the rest; vectors do not decay."""
    hidden, tables, vectors = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif settings.name == "muon" and not any(table in name for table in _TABLES) and parameter.dim() == 2:
            hidden.append(parameter)
        else:
            tables.append(parameter)
    groups = [
        {"params": tables, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    made: list[torch.optim.Optimizer] = []
    if groups:
        first, second = settings.betas
        made.append(
            torch.optim.AdamW(groups, lr=settings.lr, betas=(first, second), eps=settings.eps, foreach=True)
        )
    if hidden:
        made.append(
            Muon(hidden, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
        )
    return made


def state_tensors(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """The optimisers' tensors under `optimizer.<parameter>.<what>`, sharded as the parameters are."""
    names: dict[torch.Tensor, str] = {p: n for n, p in module.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for what, value in state.items():
                tensors[f"optimizer.{names[parameter]}.{what}"] = torch.as_tensor(value)
    return tensors


def load_state_tensors(
    module: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `state_tensors` gave; `tensors` are whole, however the parameters are sharded."""
    owners = {p: o for o in optimizers for g in o.param_groups for p in g["params"]}
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        name, what = key.removeprefix("optimizer.").rsplit(".", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:  # not the number of steps, which stays on the CPU
            value = cut(value.to(parameter.device), parameter)
        owners[parameter].state[parameter][what] = value.clone()
