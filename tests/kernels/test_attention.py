"""Paged attention against a dense float64 oracle, and its bits against themselves under every regrouping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.libraries import DTYPES, native_kernels
from kernels.paged_cases import Case, Spec, dense, dense_all, make_case
from trimtab.kernels.reference import TorchKernels

SPECS = {
    "one row": Spec(),
    "first row of a text": Spec(held=(0,), new=(1,)),
    "whole prompt": Spec(held=(0,), new=(45,)),
    "a batch of unlike lengths": Spec(held=(0, 15, 16, 17, 130), new=(5, 1, 1, 1, 2)),
    "a sequence without new rows": Spec(held=(5, 9, 2), new=(2, 0, 1)),
    "across superblocks": Spec(held=(1100,), new=(20,)),
    "exactly a superblock": Spec(held=(511, 512, 513), new=(1, 1, 1)),
    "one head each": Spec(heads=3, kv_heads=3),
    "one kv head for all": Spec(heads=8, kv_heads=1, new=(19,)),
    "odd groups": Spec(heads=15, kv_heads=3, new=(7,)),
    "head size 16": Spec(d=16),
    "head size 48": Spec(d=48, new=(9,)),
    "head size 64": Spec(d=64, new=(17,)),
    "head size 80": Spec(d=80),
    "head size 128": Spec(d=128, new=(33,)),
    "a length each head": Spec(held=((3, 40), (100, 0)), new=(4, 1)),
    "eight lengths": Spec(held=((1, 700, 0, 16, 513, 15, 17, 33),), new=(3,), heads=8, kv_heads=8, d=16),
    "window": Spec(held=(60, 3), new=(5, 9), window=7),
    "window of one": Spec(held=(60,), new=(5,), window=1),
    "window across superblocks": Spec(held=(1500,), new=(40,), window=600),
    "window of a page and one": Spec(held=(1040,), new=(16,), window=17),
    "tree": Spec(held=(20, 530), new=(9, 17), tree=True),
    "tree in a window": Spec(held=(50,), new=(9,), tree=True, window=12),
    "every new row sees all": Spec(held=(20, 0), new=(6, 40), causal=False),
    "every new row sees all, tree": Spec(held=(20,), new=(6,), causal=False, tree=True),
    "peaked": Spec(held=(600,), new=(20,), size=30.0),
    "very peaked": Spec(held=(90,), new=(20,), size=500.0),
}


def run(kernels: Any, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    case = case.clone()
    kernels.write(case.rows, case.k, case.v)
    return kernels.attend(case.rows, case.q)


def assert_dense(kernels: Any, case: Case) -> None:
    out, lse = run(kernels, case)
    true_out, true_lse = dense_all(case)
    scale = case.spec.size
    # A score of size s is exact to s ulp, and so is the exponent.
    torch.testing.assert_close(out.double(), true_out, atol=3e-6 * max(1.0, scale / 3), rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=3e-6 * scale, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_attention_is_the_dense_one(
    kernels_for: Callable[[torch.dtype], Any], name: str, dtype: torch.dtype
) -> None:
    assert_dense(kernels_for(dtype), make_case(SPECS[name], dtype))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    sequences = data.draw(st.integers(1, 4))
    ragged = data.draw(st.booleans())
    length = st.integers(0, 70)
    one = st.tuples(*[length] * kv_heads) if ragged else length
    spec = Spec(
        held=tuple(data.draw(st.lists(one, min_size=sequences, max_size=sequences))),
        new=tuple(data.draw(st.lists(st.integers(0, 20), min_size=sequences, max_size=sequences))),
        heads=kv_heads * data.draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        d=16 * data.draw(st.integers(1, 4)),
        window=data.draw(st.sampled_from([0, 0, 1, 5, 40])),
        tree=data.draw(st.booleans()),
        causal=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 10**6)),
    )
    if not sum(spec.new):
        spec = replace(spec, new=(1,) * sequences)
    case = make_case(spec, torch.float32)
    assert_dense(native_kernels(), case)
    assert_dense(TorchKernels(), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["a batch of unlike lengths", "eight lengths", "window across superblocks", "tree"]
)
def test_a_sequence_alone_has_the_bits_it_has_in_a_batch(name: str, dtype: torch.dtype) -> None:
    kernels, case = native_kernels(dtype), make_case(SPECS[name], dtype)
    out, lse = run(kernels, case)
    taken = 0
    for span in case.rows.spans.tolist():
        n = span[2] - span[1]
        alone = case.clone()
        alone.rows.spans = torch.tensor([span], dtype=torch.int32)
        if alone.rows.mask is not None:
            alone.rows.mask = alone.rows.mask[taken : taken + n * n].clone()
        taken += n * n
        o, z = run(kernels, alone)
        assert torch.equal(o[span[1] : span[2]], out[span[1] : span[2]])
        assert torch.equal(z[span[1] : span[2]], lse[span[1] : span[2]])
        others = torch.ones(len(o), dtype=torch.bool)
        others[span[1] : span[2]] = False
        assert not o[others].any() and (z[others] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [Spec(held=(0,), new=(70,)), Spec(held=(500,), new=(45,), window=100, d=64)])
@pytest.mark.parametrize("chunk", [1, 3, 16, 37])
def test_chunks_have_the_bits_of_the_whole(spec: Spec, chunk: int, dtype: torch.dtype) -> None:
    kernels, case = native_kernels(dtype), make_case(spec, dtype)
    out, lse = run(kernels, case)
    parts = case.clone()
    for begin in range(0, spec.new[0], chunk):
        end = min(begin + chunk, spec.new[0])
        parts.rows.spans = torch.tensor([[0, 0, end - begin]], dtype=torch.int32)
        kernels.write(parts.rows, parts.k[begin:end].contiguous(), parts.v[begin:end].contiguous())
        o, z = kernels.attend(parts.rows, parts.q[begin:end].contiguous())
        assert torch.equal(o, out[begin:end]) and torch.equal(z, lse[begin:end])
        parts.rows.start += end - begin


@pytest.mark.parametrize("name", ["a batch of unlike lengths", "eight lengths", "tree", "head size 128"])
def test_threads_do_not_change_a_bit(name: str) -> None:
    case = make_case(SPECS[name], torch.float32)
    expected = run(native_kernels(threads=1), case)
    for threads in (2, 5):
        for _ in range(3):
            got = run(native_kernels(threads=threads), case)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_masking_nothing_keeps_the_bits() -> None:
    case = make_case(Spec(held=(530,), new=(12,)), torch.float32)
    expected = run(native_kernels(), case)
    masked = case.clone()
    masked.rows.mask = torch.ones(12, 12, dtype=torch.uint8).tril().flatten()
    got = run(native_kernels(), masked)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_row_that_sees_nothing_is_the_empty_segment(kernels_for: Callable[[torch.dtype], Any]) -> None:
    """Negative `start` with causal_new off: the span's rows see the first start + n rows, here none."""
    case = make_case(Spec(held=(0,), new=(5,), causal=False), torch.float32)
    case.rows.start -= 5
    out, lse = kernels_for(torch.float32).attend(case.rows, case.q)
    assert not out.any() and (lse == -torch.inf).all()


def test_start_may_show_a_part_of_what_is_held(kernels_for: Callable[[torch.dtype], Any]) -> None:
    """As the sinks are asked: all rows of the span see exactly the first four keys."""
    case = make_case(Spec(held=(30,), new=(7,), causal=False), torch.float32)
    case.rows.start[:] = 4 - 7
    out, lse = kernels_for(torch.float32).attend(case.rows, case.q)
    for head in range(2):
        k, v = (x[:4] for x in case.past[0, head])
        scores = torch.einsum("ngd,td->ngt", case.q[:, 2 * head : 2 * head + 2].double(), k) * 32**-0.5
        expected = torch.einsum("ngt,td->ngd", scores.softmax(-1), v)
        torch.testing.assert_close(out[:, 2 * head : 2 * head + 2].double(), expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(
            lse[:, 2 * head : 2 * head + 2].double(), scores.logsumexp(-1), atol=2e-6, rtol=1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_is_accurate_to_a_few_ulp(dtype: torch.dtype) -> None:
    """V is one-hot a key, so the output shows the probabilities themselves, over 37 powers of e."""
    d, keys = 64, 48
    case = make_case(Spec(held=(keys,), new=(1,), heads=1, kv_heads=1, d=d), dtype)
    page = case.rows.arena.view(-1, 2, 16 * d)
    k = torch.zeros(keys, d)
    k[:, 0] = torch.linspace(0, -37, keys).to(dtype).float()
    for t in range(keys):
        where = page[case.rows.pages(0, 0, 4)[t // 16]]
        where[0].view(d, 16)[:, t % 16] = k[t].to(dtype)
        where[1].view(16, d)[t % 16] = torch.eye(d)[t].to(dtype)
    q = torch.zeros(1, 1, d)
    q[..., 0] = d**0.5
    far = torch.zeros(1, 1, d)
    far[..., 0] = -1000.0
    kernels = native_kernels(dtype)
    kernels.write(case.rows, far, torch.zeros(1, 1, d))
    out, lse = kernels.attend(case.rows, q)
    truth = k[:, 0].double().softmax(0)
    got = out[0, 0, :keys].double()
    assert ((got - truth).abs() / truth).max() < 4e-7
    assert abs(float(lse) - float(k[:, 0].double().logsumexp(0))) < 4e-7
    assert got.sum() == pytest.approx(1.0, abs=2e-7)


@pytest.mark.parametrize("first_row", [0, 2])
@pytest.mark.parametrize(
    "name",
    ["a batch of unlike lengths", "odd groups", "eight lengths", "window", "tree", "every new row sees all"],
)
def test_column_sums_are_the_probabilities_received(
    kernels_for: Callable[[torch.dtype], Any], name: str, first_row: int
) -> None:
    kernels, case = kernels_for(torch.float32), make_case(SPECS[name], torch.float32)
    kernels.write(case.rows, case.k, case.v)
    _, lse = kernels.attend(case.rows, case.q)
    spans = case.rows.spans.tolist()
    longest = max(case.spec.length(s, h) + e - b for s, b, e in spans for h in range(case.spec.kv_heads))
    sums = torch.full((len(spans), case.spec.kv_heads, longest), 0.5)
    kernels.column_sums(case.rows, case.q, lse, sums, first_row)
    expected = torch.full(sums.shape, 0.5, dtype=torch.float64)
    for span in range(len(spans)):
        for head in range(case.spec.kv_heads):
            p = dense(case, span, head)[0]
            expected[span, head, : p.shape[-1]] += p[first_row:].sum((0, 1))
    torch.testing.assert_close(sums.double(), expected, atol=1e-5, rtol=1e-5)


def test_column_sums_have_the_same_bits_for_any_threads() -> None:
    case = make_case(SPECS["eight lengths"], torch.float32)
    results = []
    for threads in (1, 5):
        kernels, c = native_kernels(threads=threads), case.clone()
        kernels.write(c.rows, c.k, c.v)
        _, lse = kernels.attend(c.rows, c.q)
        sums = torch.zeros(1, 8, 800)
        kernels.column_sums(c.rows, c.q, lse, sums)
        results.append(sums)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_write_the_same_bits(dtype: torch.dtype) -> None:
    """Rounding to the cache's type included: ties to even, subnormal and huge values."""
    special = torch.tensor(
        [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 6e-8, 3e-8, 1e-40, 6e4, -7e4]
    )
    for name in ("a batch of unlike lengths", "a length each head"):
        case = make_case(SPECS[name], dtype)
        case.k.view(-1)[: len(special)] = special
        case.v.view(-1)[: len(special)] = special
        mine, other = case.clone(), case.clone()
        native_kernels(dtype).write(mine.rows, case.k, case.v)
        TorchKernels().write(other.rows, case.k, case.v)
        assert torch.equal(mine.rows.arena.view(torch.uint8), other.rows.arena.view(torch.uint8))


@pytest.mark.parametrize("d", [16, 48, 128])
def test_rotation(kernels_for: Callable[[torch.dtype], Any], d: int) -> None:
    x = torch.randn(7, 3, d)
    angle = torch.rand(7, d // 2) * 6
    got = x.clone()
    kernels_for(torch.float32).rotate(got, angle.cos(), angle.sin())
    pairs = torch.complex(x[..., : d // 2].double(), x[..., d // 2 :].double())
    turned = pairs * torch.polar(torch.ones_like(angle).double(), angle.double())[:, None]
    torch.testing.assert_close(got.double(), torch.cat([turned.real, turned.imag], -1), atol=1e-6, rtol=1e-6)
