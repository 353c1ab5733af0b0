"""Products with int8 weights: near the truth, and the same bits however rows and threads are grouped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.libraries import native_kernels


def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) + 0.1


@pytest.mark.parametrize(
    "m,n,k", [(1, 1, 1), (1, 9, 31), (3, 8, 32), (5, 17, 33), (7, 40, 256), (12, 5, 1000)]
)
def test_product(m: int, n: int, k: int) -> None:
    x, (codes, scale) = torch.randn(m, k), weights(n, k)
    truth = (x.double() @ codes.double().T) * scale
    got = native_kernels(int8=True).matmul(x, codes, scale)
    torch.testing.assert_close(got.double(), truth, atol=3e-4 * k**0.5, rtol=1e-6)


def test_extreme_codes_are_signed_whole_numbers() -> None:
    codes = torch.tensor([[-128, -127, -1, 0, 1, 127] * 16], dtype=torch.int8)
    got = native_kernels(int8=True).matmul(torch.eye(96), codes, torch.ones(1))
    assert got.flatten().tolist() == codes.flatten().tolist()


@pytest.mark.parametrize("k", [32, 77, 512])
def test_a_row_has_the_same_bits_in_every_batch(k: int) -> None:
    """Codes are read as they lie for a few rows, and made floats first for more."""
    x, kernels = torch.randn(23, k), native_kernels(int8=True)
    for n in (1, 3, 8, 21):
        codes, scale = weights(n, k)
        alone = torch.cat([kernels.matmul(x[i : i + 1].contiguous(), codes, scale) for i in range(23)])
        for rows in (2, 3, 4, 5, 6, 11, 23):
            assert torch.equal(kernels.matmul(x[:rows].contiguous(), codes, scale), alone[:rows]), (rows, n)
        assert torch.equal(kernels.matmul(x.flip(0).contiguous(), codes, scale), alone.flip(0))


def test_threads_and_neighbouring_weights_do_not_change_a_bit() -> None:
    x, (codes, scale) = torch.randn(6, 200), weights(83, 200)
    expected = native_kernels(int8=True).matmul(x, codes, scale)
    for threads in (2, 5):
        assert torch.equal(native_kernels(threads=threads, int8=True).matmul(x, codes, scale), expected)
    part = native_kernels(int8=True).matmul(x, codes[40:47].contiguous(), scale[40:47].contiguous())
    assert torch.equal(part, expected[:, 40:47])
