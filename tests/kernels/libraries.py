"""Compiled kernels for tests, each made once; where there is no compiler the test is skipped and says so."""

from __future__ import annotations

import functools

import pytest
import torch

from trimtab.kernels.build import build
from trimtab.kernels.native import Library, kind_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _made(dtype: torch.dtype, threads: int, int8: bool) -> Library | None:
    return Library(dtype, threads, int8) if build(kind_of(dtype, int8)) else None


def native_kernels(dtype: torch.dtype = torch.float32, threads: int = 1, int8: bool = False) -> Library:
    library = _made(dtype, threads, int8)
    if library is None:
        pytest.skip("no C++ compiler that builds the CPU kernels on this machine")
    return library
