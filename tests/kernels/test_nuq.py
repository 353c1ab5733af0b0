"""KVQuant's codec: C++ against plain torch, and what it keeps exactly."""

from __future__ import annotations

import pytest
import torch

from kernels.libraries import DTYPES
from kernels.test_per_layer import LAYERS, TORCH, WIDTH, fill, library, new_rows, query, tables
from trimtab.kernels import native_per_layer, reference_per_layer
from trimtab.kernels.nuq import NuqCodec, outliers_per_side
from trimtab.kernels.per_layer import PerLayerTables


def codec(bits: int, dtype: torch.dtype, k_share: float = 0.05, v_side: int = 1) -> NuqCodec:
    g = torch.Generator().manual_seed(bits)
    low = -3 - torch.rand(LAYERS, WIDTH, generator=g)
    books = [torch.rand(LAYERS, 2**bits, generator=g).mul(2).sub(1).sort(-1).values for _ in range(2)]
    ranges = torch.stack([low, -low + 1], 1)
    return NuqCodec.make(dtype, ranges, (books[0], books[0]), (books[1], books[1] * 1.05), k_share, v_side)


SETTINGS = [
    {"bits": 2},
    {"bits": 3},
    {"bits": 4, "v_side": 3},
    {"bits": 3, "k_share": 0.0, "v_side": 0},
    {"bits": 2, "k_share": 0.001},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_native_is_the_reference(settings: dict[str, float], dtype: torch.dtype) -> None:
    kernels = library(dtype)
    mine, other = (
        tables(dtype, hadamard=1, ordered=False, codec=codec(dtype=dtype, **settings))  # type: ignore[arg-type]
        for _ in range(2)
    )
    fill(mine, native_per_layer, kernels)
    fill(other, reference_per_layer, TORCH)
    for t, ops, k in ((mine, native_per_layer, kernels), (other, reference_per_layer, TORCH)):
        n = new_rows(t, ops, k, (4, 30, 1))
    assert (mine.arena != other.arena).float().mean() < 1e-4
    got = native_per_layer.attend(kernels, mine, query(n))  # type: ignore[arg-type]
    expected = reference_per_layer.attend(TORCH, mine, query(n))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def coded_and_exact(chosen: NuqCodec) -> tuple[PerLayerTables, PerLayerTables]:
    """The same text, its first 590 rows coded in one of them."""
    pair = []
    for _ in range(2):
        t = tables(hadamard=1, ordered=False, rope=False, codec=chosen)
        t.kept_count.zero_()
        fill(t, native_per_layer, library(torch.float32))
        pair.append(t)
    pair[1].done.zero_()
    return pair[0], pair[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_the_nearest_centroids_and_outliers_exact(bits: int) -> None:
    chosen = codec(bits, torch.float32, k_share=0.5)
    coded, exact = coded_and_exact(chosen)
    for layer in range(LAYERS):
        coded.layer = exact.layer = layer
        (k, v), (k_true, v_true) = (reference_per_layer.seen(t, 1, 600) for t in (coded, exact))
        k, v, k_true, v_true = (x[:590].flatten(1) for x in (k, v, k_true, v_true))
        low, high, middle, half = chosen.k_range[layer]
        outside = (k_true < low) | (k_true > high)
        assert 0.005 < float(outside.float().mean()) < 0.2, "nothing was put to the test"
        assert torch.equal(k[outside], k_true[outside])
        values = chosen.k_book[layer, : 2**bits] * half[:, None] + middle[:, None]
        nearest = (k_true[..., None] - values).abs().amin(-1)
        torch.testing.assert_close((k - k_true).abs()[~outside], nearest[~outside], atol=1e-5, rtol=0)
        ends = v_true.argsort(-1)[:, [0, -1]]
        assert torch.equal(v.gather(1, ends), v_true.gather(1, ends))
        assert not torch.equal(v, v_true)


def test_a_full_list_clamps_what_comes_later_and_counts_it() -> None:
    roomy, tight = codec(3, torch.float32, k_share=0.5), codec(3, torch.float32, k_share=0.004)
    assert tight.k_most < 30 and tight.k_unit < roomy.k_unit
    counts, seen = [], []
    for chosen in (roomy, tight):
        coded, exact = coded_and_exact(chosen)
        coded.layer = exact.layer = 0
        units = coded.arena.view(-1, chosen.k_unit + chosen.v_unit)
        where = coded.coded[1, : 590 // 16].long() * LAYERS
        counts.append(chosen.listed(units[where, : chosen.k_unit]))
        seen.append((reference_per_layer.seen(coded, 1, 600)[0], reference_per_layer.seen(exact, 1, 600)[0]))
    (all_of_them, none), (kept, clamped) = counts
    assert none == 0 and kept + clamped == all_of_them and clamped > 0 and kept <= tight.k_most * (590 // 16)
    k, true = (x[:590].flatten(1) for x in seen[1])
    low, high = tight.k_range[0, 0], tight.k_range[0, 1]
    inside = (k >= low - 1e-5) & (k <= high + 1e-5)
    assert bool((inside | (k == true)).all()), "in range, or exact"


@pytest.mark.parametrize("width", [16, 128, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_have_the_room_asked_for_and_waste_little(width: int, dtype: torch.dtype) -> None:
    book = torch.linspace(-1, 1, 8).expand(LAYERS, 8)
    for share in (0.01, 0.05):
        made = NuqCodec.make(dtype, torch.ones(LAYERS, 2, width), (book, book), (book, book), share, 1)
        entry = dtype.itemsize + 2
        used = width * 3 * 2 + 32 + made.k_most * entry
        assert made.k_most >= 16 * width * share
        assert 0 <= made.k_unit - used < entry and made.k_unit % 32 == made.v_unit % 32 == 0
        whole = 2 * 16 * width * dtype.itemsize
        assert (made.k_unit + made.v_unit) * 64 % whole == 0 or width == 16


def test_percentiles_leave_so_many_outside() -> None:
    for width in (32, 128, 1024):
        x = torch.rand(width, generator=torch.Generator().manual_seed(0)).double()
        side = outliers_per_side(0.01, width)
        assert side == int((x > x.quantile(0.995)).sum()) == int((x < x.quantile(0.005)).sum())
    assert outliers_per_side(0.0, 128) == 0
