"""The C++ operators for training: compiled on first use into the cache folder of the other kernels.

A library of its own, so that a change to either leaves the other's compiled file as it is.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels import build

SOURCE = Path(__file__).parent / "cpu"

_ARGUMENTS = {
    "tt_packed_forward": [c_void_p, c_int32],
    "tt_packed_backward": [c_void_p, c_void_p, c_int32],
    "tt_rms_forward": [c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p, c_void_p, c_int32],
    "tt_rms_backward": [*[c_void_p] * 4, c_int64, c_int64, c_void_p, c_void_p, c_int32],
    "tt_swiglu_forward": [c_void_p, c_void_p, c_int64, c_void_p, c_int32],
    "tt_swiglu_backward": [*[c_void_p] * 3, c_int64, c_void_p, c_void_p, c_int32],
    "tt_softmax_loss": [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_float, c_void_p, c_void_p, c_int32],
}
_PLAIN = (Tensor, torch.nn.Parameter)  # a tensor that is traced or split over processes has no address


def native(*tensors: Tensor) -> Any | None:
    """The compiled operators, or None where these tensors are not plain float32 ones on the CPU."""
    if torch.compiler.is_compiling():
        return None
    for x in tensors:
        if x.dtype != torch.float32 or x.device.type != "cpu" or type(x) not in _PLAIN:
            return None
    return library()


@functools.cache
def library() -> Any | None:
    """The compiled operators, or None where they cannot be had (the log says why)."""
    path = _built()
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    for name, types in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded


def _path() -> Path:
    """Where the library is or shall be: its name stands for all sources, the compiler and the processor."""
    digest = hashlib.sha256(build.library_path("float32").name.encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return build.cache_folder() / f"training-{digest.hexdigest()[:16]}.so"


def _built() -> Path | None:
    target = _path()
    if target.exists():
        return target
    cxx = build.compiler()
    if cxx is None or sys.platform == "win32":
        return None
    build.log.info("compiling the CPU operators for training once (about 5 s)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f"{target.stem}-", suffix=".tmp", dir=target.parent)
        os.close(handle)
        try:
            _compile(cxx, scratch)
            os.replace(scratch, target)
        finally:
            Path(scratch).unlink(missing_ok=True)
        return target
    except OSError as error:
        build.log.warning(
            "cannot write the kernel cache %s (%s); training on plain torch", target.parent, error
        )
    except subprocess.SubprocessError as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[:3]
        build.log.warning(
            "the training operators did not compile (%s); using plain torch", " | ".join(detail)
        )
    return None


def _compile(cxx: str, target: str) -> None:
    """With OpenMP the operators run on the threads that torch has already; else on one thread."""
    command = [cxx, *build.FLAGS, f"-I{build.SOURCE}", str(SOURCE / "training.cpp"), "-o", target]
    try:
        subprocess.run([*command, "-fopenmp"], check=True, capture_output=True, text=True, timeout=600)
    except subprocess.CalledProcessError:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
