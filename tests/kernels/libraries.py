"""Compiled kernels for tests, each made once; where there is no compiler the test is skipped and says so."""

from __future__ import annotations

import functools

import pytest
import torch

from trimtab.kernels.build import build
from trimtab.kernels.native import Library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _made(dtype: torch.dtype, threads: int) -> Library | None:
    return Library(dtype, threads) if build(str(dtype).removeprefix("torch.")) else None


def native_kernels(dtype: torch.dtype = torch.float32, threads: int = 1) -> Library:
    library = _made(dtype, threads)
    if library is None:
        pytest.skip("no C++ compiler that builds the CPU kernels on this machine")
    return library
