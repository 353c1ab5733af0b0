"""Moments of queries, and H2O's scores and victims, against torch."""

from __future__ import annotations

import pytest
import torch

from kernels.libraries import native_kernels
from trimtab.kernels.reference import TorchKernels


@pytest.mark.parametrize("threads", [1, 3])
def test_moments_are_sums_in_the_order_of_rows(threads: int) -> None:
    layers, n, heads, d = 2, 37, 3, 32
    q = torch.randn(layers, n + 5, heads, d, generator=torch.Generator().manual_seed(1))
    mine = q[:, 5:]
    total, outer = torch.zeros(layers, heads, d), torch.zeros(layers, heads, d, d)
    native_kernels(threads=threads).moments(mine, total, outer)
    expected, square = torch.zeros_like(total), torch.zeros_like(outer)
    TorchKernels().moments(mine, expected, square)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outer.triu(), square.triu(), atol=1e-4, rtol=1e-4)
    parts, squares = torch.zeros_like(total), torch.zeros_like(outer)
    for part in mine.split((1, 20, 16), 1):
        native_kernels().moments(part, parts, squares)
    assert torch.equal(parts, total) and torch.equal(squares, outer)
