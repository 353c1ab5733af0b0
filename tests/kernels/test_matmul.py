"""The matrix product: near the truth, and the same bits however rows, threads and weights are grouped."""

from __future__ import annotations

import pytest
import torch

from kernels.libraries import DTYPES, native_kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m,n,k", [(1, 1, 1), (1, 9, 31), (3, 8, 32), (5, 17, 33), (7, 40, 256), (12, 5, 1000)]
)
def test_product(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w = torch.randn(m, k), torch.randn(n, k).to(dtype)
    seen = x.to(dtype) if native_kernels(dtype).rounds_inputs else x
    truth = seen.double() @ w.double().T
    got = native_kernels(dtype).matmul(x, w)
    torch.testing.assert_close(got.double(), truth, atol=2e-6 * k**0.5, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [32, 77, 512])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, k: int) -> None:
    """All tile heights (1 to 5 and their sums), all widths of the weight's tail."""
    x = torch.randn(23, k)
    for n in (1, 3, 8, 21):
        w = torch.randn(n, k).to(dtype)
        kernels = native_kernels(dtype)
        alone = torch.cat([kernels.matmul(x[i : i + 1].contiguous(), w) for i in range(23)])
        for rows in (2, 3, 4, 5, 6, 11, 23):
            assert torch.equal(kernels.matmul(x[:rows].contiguous(), w), alone[:rows]), (rows, n)
        assert torch.equal(kernels.matmul(x.flip(0).contiguous(), w), alone.flip(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_neighbouring_weights_do_not_change_a_bit(dtype: torch.dtype) -> None:
    x, w = torch.randn(6, 200), torch.randn(83, 200).to(dtype)
    expected = native_kernels(dtype).matmul(x, w)
    for threads in (2, 5):
        assert torch.equal(native_kernels(dtype, threads).matmul(x, w), expected)
    assert torch.equal(native_kernels(dtype).matmul(x, w[40:47].contiguous()), expected[:, 40:47])


def test_rows_beyond_the_second_level_cache_keep_their_bits() -> None:
    """More rows than one block of activations holds."""
    x, w = torch.randn(60, 6000), torch.randn(9, 6000)
    kernels = native_kernels()
    whole = kernels.matmul(x, w)
    assert torch.equal(kernels.matmul(x[50:51].contiguous(), w), whole[50:51])


def test_read_sums_the_buffer() -> None:
    buffer = torch.ones(128 * 40)
    assert native_kernels(threads=2).read(buffer) == buffer.numel()
