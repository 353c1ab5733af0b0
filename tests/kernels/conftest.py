from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.libraries import native_kernels
from trimtab.kernels.native import Library
from trimtab.kernels.reference import TorchKernels

Kernels = Library | TorchKernels


@pytest.fixture(params=["native", "torch"])
def kernels_for(request: pytest.FixtureRequest) -> Callable[[torch.dtype], Kernels]:
    """The kernels of a weight type, once in C++ and once in torch."""
    if request.param == "torch":
        return lambda dtype: TorchKernels()
    return native_kernels
