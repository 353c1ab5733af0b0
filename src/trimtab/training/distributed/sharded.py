"""Tensors of which each process holds a part (`DTensor`), beside plain ones that are treated the same.

Nothing here imports `torch.distributed.tensor` before a tensor is sharded: that takes a second.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of `tensor` only."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this process holds, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`; every process has to ask for it at once."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def joined(part: Tensor, like: Tensor) -> Tensor:
    """The whole of which each process has a `part`, cut as `like` is; all have to ask at once."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    sharded = DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        shape=like.shape,
        stride=torch.empty(like.shape, device="meta").stride(),
    )
    return sharded.full_tensor()


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which every process holds whole, cut as `like` is: sharded or plain, no communication."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)
