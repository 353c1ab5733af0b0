"""The C++ kernels over a per-layer coded cache; reference_per_layer.py has the same functions in torch."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from trimtab.kernels.native import Library
from trimtab.kernels.per_layer import PerLayerTables

_ARGUMENTS = {
    "tt_per_layer_write": [c_void_p] * 3,
    "tt_per_layer_attend": [c_void_p] * 4,
    "tt_per_layer_code": [c_void_p] * 2 + [c_int32] * 3,
    "tt_hadamard": [c_void_p, c_int64, c_int32, c_int32],
}


def prepare(library: Library) -> None:
    """Tell ctypes the functions' arguments; once for each library."""
    for name, types in _ARGUMENTS.items():
        getattr(library.lib, name).argtypes = types


def write(library: Library, tables: PerLayerTables, k: Tensor, v: Tensor) -> None:
    """Store the new rows k, v float32 [N, G, d] of every span in full."""
    call, _keep = tables.as_struct()
    library.lib.tt_per_layer_write(ctypes.byref(call), k.data_ptr(), v.data_ptr())


def attend(library: Library, tables: PerLayerTables, q: Tensor) -> Tensor:
    """Attention [N, H, d] of rotated q float32 [N, H, d] over coded rows and rows in full."""
    out = torch.empty_like(q)
    call, _keep = tables.as_struct()
    library.lib.tt_per_layer_attend(library.team, ctypes.byref(call), q.data_ptr(), out.data_ptr())
    return out


def code(library: Library, tables: PerLayerTables, slot: int, rows: range) -> None:
    """Code rows of one sequence in all layers; those named in `kept_at` are copied in full."""
    call, _keep = tables.as_struct()
    library.lib.tt_per_layer_code(library.team, ctypes.byref(call), slot, rows.start, rows.stop)


def hadamard(library: Library, x: Tensor, block: int) -> None:
    """Orthonormal Hadamard transforms of `block` consecutive numbers of x float32 [..., n], in place."""
    library.lib.tt_hadamard(x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], block)
