"""Which process of a run this is, and what all of them do together; one process is the trivial case.

Processes come from `torchrun`, which says so in the environment. Every one draws the same segments of a
step and computes the gradients of its share of them. Weights, gradients and optimiser state are sharded
over the processes layer by layer (FSDP2, `fully_shard`; ZeRO stage 3, arXiv 1910.02054).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.models.transformer import Model
from trimtab.training.data.batch import Batch, pack, split
from trimtab.training.data.segments import Segment
from trimtab.training.distributed.sharded import whole

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What goes through the model at a time.

    counts: false where there are fewer segments than processes. All processes pass through the layers
        together, so this one computes along on a segment of another, and nothing of it may be added.
    """

    segments: list[Segment]
    batch: Batch
    counts: bool


class Ranks:
    """The processes of a run.

    Attributes:
        rank, world: number of this process, counted from 0, and how many there are.
        device: where this process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.world == 1:
            return
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if self.device.index >= torch.cuda.device_count():
                raise ConfigError(
                    f"torchrun started process {self.device.index + 1} of this machine, which has "
                    f"{torch.cuda.device_count()} GPUs; set --nproc-per-node to that or less"
                )
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def shard(self, *modules: nn.Module) -> None:
        """Leave to each process its part of all parameters; before optimisers are made.

        The embedding, the last norm and the head stay together from the forward to the backward pass: what
        an objective does with `output_weight` after `Model.run` finds them whole.
        """
        if self.world == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in modules:
            for layer in module.model.layers if isinstance(module, Model) else ():
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
            if isinstance(module, Model):
                register_fsdp_forward_method(module, "run")
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    # Losses are divided by the units of all processes, so gradients are to be added up.
                    part.set_gradient_divide_factor(1.0)
                    part.set_force_sum_reduction_for_comms(True)

    def reshard(self, module: nn.Module) -> None:
        """Put away what a forward pass without a backward one has left whole."""
        if self.world == 1:
            return
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def micro_batches(self, segments: Sequence[Segment], max_tokens: int) -> list[MicroBatch]:
        """This process's share of `segments`, as many micro-batches as every other process has."""
        groups = even_groups(split(segments, max_tokens), self.world)
        return [
            MicroBatch(group, pack(group or segments[:1]).to(self.device), counts=bool(group))
            for group in groups[self.rank :: self.world]
        ]

    def all_sum(self, *values: float) -> list[float]:
        """Each value added up over the processes, in float64."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, *values: bool) -> list[bool]:
        """Whether each value is true on any process, so that all of them act alike."""
        return [total > 0 for total in self.all_sum(*map(float, values))]

    def clip(self, parameters: Iterable[Tensor], largest: float) -> float:
        """The norm of all gradients together; they are scaled down where it is above `largest`."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        return float(whole(norm))

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors whole, on the first process; the others help and get none."""
        if self.world == 1:
            return dict(tensors)
        found = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach())
            if self.is_first:
                found[name] = full.cpu()
        return found

    def unshard(self, module: nn.Module) -> None:
        """Put the parameters of `module` together for good on the first process, in memory of the CPU.

        The last thing that is done with it: it can be saved then, and computes nothing any more.
        """
        if self.world == 1:
            return
        from torch.distributed.fsdp import FSDPModule

        self.reshard(module)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.__class__ = type(part).__mro__[2]  # `fully_shard` put two classes before it
            for name, parameter in part.named_parameters(recurse=False):
                full = whole(parameter.detach()).cpu()
                kept = full if self.is_first else full.to("meta")
                setattr(part, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Within, the other processes begin when the first is through."""
        if not self.is_first:
            self.all_sum(0.0)
        yield
        if self.is_first:
            self.all_sum(0.0)


def even_groups(groups: Sequence[list[T]], count: int) -> list[list[T]]:
    """`groups` cut further until there is a multiple of `count`; empty ones where nothing can be cut."""
    made = list(groups)
    while len(made) % count:
        most = max(range(len(made)), key=lambda i: len(made[i]))
        half = len(made[most]) // 2
        if half == 0:
            made.append([])
        else:
            made[most : most + 1] = [made[most][:half], made[most][half:]]
    return made
