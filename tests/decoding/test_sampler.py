"""The sampler: exact laws against transformers, the order of steps, independence of rows, bad logits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.decoding import sampler as sampler_module
from trimtab.decoding.processors import TokenCounts
from trimtab.decoding.sampler import Row, Sampled, Sampler
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.errors import NumericsError, RequestError

VOCAB = 500


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def row(seed: int = 0, position: int = 10, prompt=(), output=(), **settings) -> Row:
    return Row(SamplingParams(**settings), seed, position, prompt, output)


def transformers_law(logits: torch.Tensor, tokens: list[int], **s) -> torch.Tensor:
    from transformers.generation import logits_process as hf

    steps = []
    if s.get("repetition_penalty", 1.0) != 1.0:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(s["repetition_penalty"]))
    if s.get("temperature", 1.0) != 1.0:
        steps.append(hf.TemperatureLogitsWarper(s["temperature"]))
    if s.get("top_k", 0) > 0:
        steps.append(hf.TopKLogitsWarper(s["top_k"]))
    if s.get("top_p", 1.0) < 1.0:
        steps.append(hf.TopPLogitsWarper(s["top_p"]))
    if s.get("min_p", 0.0) > 0:
        steps.append(hf.MinPLogitsWarper(s["min_p"]))
    scores = logits.clone()[None]
    ids = torch.tensor([tokens], dtype=torch.long)
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores[0].double(), dim=-1)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 200},
        {"top_k": VOCAB + 1},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 0.999},
        {"min_p": 0.02},
        {"min_p": 0.5},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 1.5, "top_k": 300, "top_p": 0.97, "repetition_penalty": 1.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab", [VOCAB, 20_000])
def test_law_equals_transformers(setting, seed, vocab):
    logits = logits_of(seed, vocab=vocab)[0]
    prompt, output = [1, 5, 5, 80], [7, 80, 300]
    law = Sampler().distribution(logits, row(prompt=prompt, output=output, **setting))
    expected = transformers_law(logits, prompt + output, **setting).numpy()
    assert ((law > 0) == (expected > 0)).all()
    np.testing.assert_allclose(law, expected, rtol=2e-5, atol=1e-12)


def test_presence_and_frequency_count_output_and_path_only():
    logits = logits_of(0)[0]
    r = row(prompt=[3, 4], output=[4, 5, 5], presence_penalty=0.5, frequency_penalty=0.25)
    r.path = (5, 6)
    expected = logits.double()
    for token, count in {4: 1, 5: 3, 6: 1}.items():
        expected[token] -= 0.5 + 0.25 * count
    law = Sampler().distribution(logits, r)
    np.testing.assert_allclose(law, torch.softmax(expected, -1).numpy(), rtol=1e-5)


def test_repetition_covers_prompt_output_and_path_once():
    logits = logits_of(1)[0]
    r = row(prompt=[3], output=[4, 4], repetition_penalty=1.5)
    r.path = (4, 5)
    expected = logits.double()
    for token in (3, 4, 5):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    np.testing.assert_allclose(
        Sampler().distribution(logits, r), torch.softmax(expected, -1).numpy(), rtol=1e-5
    )


def test_kept_counts_equal_fresh_counts():
    logits = logits_of(2)[0]
    settings = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    prompt, output = [1, 2, 3], [2, 9, 9, 11]
    counts = TokenCounts(prompt)
    for token in output:
        counts.add(token)
    fresh, kept = (row(prompt=prompt, output=output, **settings) for _ in range(2))
    kept.counts = counts
    fresh.path = kept.path = (9, 30)
    laws = [Sampler().distribution(logits, r) for r in (fresh, kept)]
    assert (laws[0] == laws[1]).all()
    assert counts.output == {2: 1, 9: 2, 11: 1}, "a tentative path was counted for good"


def bit_mask(allowed: list[int], vocab: int) -> np.ndarray:
    words = np.zeros(-(-vocab // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words.view(np.int32)


@pytest.mark.parametrize("vocab", [31, 32, 33, 500])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_constraint_mask(vocab, as_tensor):
    logits = logits_of(3, vocab=vocab)[0]
    allowed = [0, 5, 30, vocab - 1]
    r = row()
    words = bit_mask(allowed, vocab)
    r.mask = torch.from_numpy(words) if as_tensor else words
    law = Sampler().distribution(logits, r)
    assert sorted(np.flatnonzero(law)) == sorted(set(allowed))
    expected = torch.softmax(logits[sorted(set(allowed))].double(), -1).numpy()
    np.testing.assert_allclose(law[sorted(set(allowed))], expected, rtol=1e-5)


def test_a_mask_of_the_wrong_size_is_refused():
    r = row()
    r.mask = np.zeros(3, dtype=np.int32)
    with pytest.raises(RequestError, match=r"shape \(3,\).*needs int32 words of shape \(16,\)"):
        Sampler().sample(logits_of(0), [r])


def test_order_of_steps():
    """Bias, then the user's part, then the mask, then temperature, then truncation."""
    seen = {}

    def user(logits: torch.Tensor, r: Row) -> torch.Tensor:
        seen["logits"] = logits.clone()
        logits[2] += 100.0  # the mask must still forbid it
        logits[3] += 1.0
        return logits

    logits = torch.zeros(64)
    r = row(logit_bias={1: 2.0, 3: 1.0}, temperature=2.0, top_k=2, repetition_penalty=2.0, prompt=[1])
    r.processors = (user,)
    r.mask = bit_mask([0, 1, 3, 4], 64)
    law = Sampler().distribution(logits, r)
    assert seen["logits"][1] == 2.0, "the penalty comes before the bias: 0 / 2 + 2"
    # Scores 2 (bias) and 2 (bias 1 + user 1) share the mass after temperature and top-2.
    assert np.flatnonzero(law).tolist() == [1, 3]
    np.testing.assert_allclose(law[[1, 3]], [0.5, 0.5], rtol=1e-6)
    assert (logits == 0).all(), "the model's logits were changed"


def test_top_p_comes_after_top_k_and_renormalises():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    # Of the top 2 alone, 0.4 / 0.7 = 0.57 is more than 0.5; of all four, 0.4 is less.
    law = Sampler().distribution(logits, row(top_k=2, top_p=0.5))
    assert np.flatnonzero(law).tolist() == [0]
    assert np.flatnonzero(Sampler().distribution(logits, row(top_p=0.5))).tolist() == [0, 1]


def test_ties_are_stable():
    logits = torch.zeros(1000)
    assert Sampler().sample(logits[None], [row(temperature=0)])[0].token == 0
    law = Sampler().distribution(logits, row(top_p=0.25))
    assert np.flatnonzero(law).tolist() == list(range(251)) or np.flatnonzero(law).tolist() == list(
        range(250)
    )
    law = Sampler().distribution(logits, row(top_k=5))
    assert np.count_nonzero(law) == 1000, "ties with the k-th are kept, as in transformers and vLLM"


def test_a_user_processor_must_return_logits():
    r = row()
    r.processors = (lambda logits, row: logits[:3],)
    with pytest.raises(RequestError, match=r"returned \(3,\)"):
        Sampler().sample(logits_of(0), [r])


def test_min_tokens_forbids_every_end():
    logits = torch.zeros(10)
    logits[2] = 50.0
    logits[3] = 40.0
    r = row(temperature=0, min_tokens=3, stop_token_ids=[3], output=[7])
    r.eos_ids = frozenset({2})
    assert Sampler().sample(logits[None], [r])[0].token == 0
    r.path = (8, 9)
    assert Sampler().sample(logits[None], [r])[0].token == 2


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_drawn_tokens_follow_the_law(setting):
    logits = logits_of(5, vocab=12, spread=1.5)[0]
    n = 6000
    rows = [row(seed=99, position=i, **setting) for i in range(n)]
    drawn = Sampler().sample(logits.expand(n, -1).contiguous(), rows)
    law = Sampler().distribution(logits, rows[0])
    observed = np.bincount([s.token for s in drawn], minlength=12)
    assert (observed[law == 0] == 0).all()
    alive = law > 0
    expected = law[alive] * n
    x = ((observed[alive] - expected) ** 2 / expected).sum()
    cells = alive.sum() - 1
    assert x < cells + 4 * math.sqrt(2 * cells), (observed, expected)


def test_drawn_tokens_follow_the_law_over_a_large_vocabulary():
    """The two-step search of large vocabularies, folded into cells of equal expected size."""
    vocab, n = 3000, 20_000
    logits = logits_of(6, vocab=vocab, spread=1.0)
    law = Sampler().distribution(logits[0], row())
    rows = [row(seed=4, position=i) for i in range(n)]
    tokens = [Sampler().sample(logits, [r])[0].token for r in rows]
    cell = np.minimum((law.cumsum() * 50).astype(int), 49)
    expected = np.bincount(cell, weights=law, minlength=50) * n
    observed = np.bincount(cell[tokens], minlength=50)
    assert ((observed - expected) ** 2 / expected).sum() < 49 + 4 * math.sqrt(2 * 49)


@pytest.mark.parametrize("vocab", [8, 512, 513, 5000])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53, 0.5, 1e-300])
def test_never_a_token_of_probability_zero(vocab, u, monkeypatch):
    monkeypatch.setattr(sampler_module, "uniform", lambda *key: u)
    for alive in ([0], [vocab // 2], [vocab - 1], [1, vocab - 3], list(range(3, vocab - 3))):
        logits = torch.full((1, vocab), -math.inf)
        logits[0, alive] = torch.linspace(-0.1, 0.1, len(alive))
        assert Sampler().sample(logits, [row()])[0].token in alive


@settings(max_examples=200)
@given(st.integers(1, 3000), st.integers(0, 10**9), st.floats(0, 1, exclude_max=True))
def test_search_equals_plain_inverse(size, seed, u):
    weights = np.random.default_rng(seed).exponential(size=size).astype(np.float32)
    weights[np.random.default_rng(seed + 1).random(size) < 0.5] = 0.0
    weights[seed % size] = 1.0
    at = sampler_module._draw(weights, u)
    cumulative = np.concatenate([[0.0], weights.astype(np.float64).cumsum()])
    total, slack = cumulative[-1], 1e-12 * cumulative[-1]
    assert weights[at] > 0
    assert cumulative[at] - slack <= u * total <= cumulative[at + 1] + slack


SETTINGS = [
    {"temperature": 0},
    {},
    {"temperature": 0.6},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.1, "logprobs": 3},
    {"temperature": 0, "logprobs": 5},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"logit_bias": {3: 5.0}, "top_k": 5, "top_p": 0.5},
]


def test_a_row_does_not_depend_on_its_neighbours():
    logits = logits_of(7, rows=len(SETTINGS), vocab=4096)
    rows = [row(seed=i, position=50 + i, prompt=[1, 2], output=[3, 3], **s) for i, s in enumerate(SETTINGS)]
    together = Sampler().sample(logits, rows)
    alone = [Sampler().sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    assert together == alone
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = Sampler().sample(logits[order], [rows[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(len(rows))] == together


def test_many_greedy_rows():
    logits = logits_of(8, rows=40)
    drawn = Sampler().sample(logits, [row(temperature=0)] * 40)
    assert [s.token for s in drawn] == logits.argmax(-1).tolist()
    assert all(s == Sampled(s.token) for s in drawn)


def test_same_seed_same_tokens_and_positions_differ():
    logits = logits_of(9).expand(50, -1).contiguous()
    draw = lambda seed: [  # noqa: E731
        s.token for s in Sampler().sample(logits, [row(seed=seed, position=i) for i in range(50)])
    ]
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(set(draw(1))) > 5


def test_logprobs_are_the_models_own():
    logits = logits_of(10)
    r = row(logprobs=4, temperature=0.2, logit_bias={7: 100.0}, repetition_penalty=1.5, prompt=[8])
    drawn = Sampler().sample(logits, [r])[0]
    expected = torch.log_softmax(logits[0].double(), -1)
    assert drawn.token == 7
    assert drawn.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    best = expected.topk(4)
    assert [token for token, _ in drawn.top] == best.indices.tolist()
    assert [x for _, x in drawn.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_zero_reports_the_chosen_token_only():
    drawn = Sampler().sample(logits_of(11), [row(logprobs=0)])[0]
    assert drawn.logprob is not None and drawn.top == ()
    assert Sampler().sample(logits_of(11), [row()])[0].logprob is None


def test_more_logprobs_than_tokens():
    drawn = Sampler().sample(logits_of(12, vocab=3), [row(logprobs=20)])[0]
    assert sorted(token for token, _ in drawn.top) == [0, 1, 2]


@pytest.mark.parametrize("others", [{"temperature": 0}, {}, {"top_k": 3, "logprobs": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize(
    ("poison", "words"),
    [(math.nan, "not numbers"), (math.inf, "infinite"), (-math.inf, "no token is allowed")],
)
def test_bad_rows_report_and_leave_the_others_alone(others, poison, words):
    logits = logits_of(13, rows=3)
    clean = Sampler().sample(logits, [row(seed=i, **others) for i in range(3)])
    if poison == -math.inf:
        logits[1] = poison
    else:
        logits[1, 17] = poison
    drawn = Sampler().sample(logits, [row(seed=i, **others) for i in range(3)])
    assert [drawn[0], drawn[2]] == [clean[0], clean[2]]
    assert drawn[1].token == -1 and words in (drawn[1].error or "")
    with pytest.raises(NumericsError, match=words):
        Sampler().distribution(logits[1], row(**others))


def test_a_mask_that_forbids_everything():
    r = row()
    r.mask = bit_mask([], VOCAB)
    assert "no token is allowed" in (Sampler().sample(logits_of(0), [r])[0].error or "")


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-10, 1e30])
def test_extreme_temperatures(temperature):
    logits = logits_of(14)
    law = Sampler().distribution(logits[0], row(temperature=temperature))
    assert law.sum() == pytest.approx(1.0)
    if temperature < 1:
        assert law[int(logits.argmax())] == pytest.approx(1.0)
    else:
        np.testing.assert_allclose(law, 1 / VOCAB, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_layouts(dtype):
    wide = logits_of(15, rows=2, vocab=2 * VOCAB).to(dtype)
    view = wide[:, ::2]
    drawn = Sampler().sample(view, [row(temperature=0), row()])
    again = Sampler().sample(view.float().contiguous(), [row(temperature=0), row()])
    assert drawn == again


def test_logits_that_track_gradients():
    logits = logits_of(16).requires_grad_()
    assert Sampler().sample(logits, [row(temperature=0)])[0].token == int(logits.argmax())


def test_no_rows():
    assert Sampler().sample(torch.empty(0, 5), []) == []


@pytest.mark.gpu
def test_rows_on_a_gpu_equal_rows_on_the_cpu():
    logits = logits_of(17, rows=len(SETTINGS), vocab=4096)
    logits[3, 5] = math.nan
    rows = [row(seed=i, prompt=[1, 2], output=[3, 3], **s) for i, s in enumerate(SETTINGS)]
    assert Sampler().sample(logits.cuda(), rows) == Sampler().sample(logits, rows)
    assert Sampler().sample(logits.cuda()[:1], rows[:1]) == Sampler().sample(logits[:1], rows[:1])


def test_the_path_for_other_devices_gives_the_same_tokens():
    logits = logits_of(18, rows=len(SETTINGS) + 3, vocab=4096)
    rows = [row(seed=i, prompt=[1, 2], output=[3, 3], **s) for i, s in enumerate([*SETTINGS, *SETTINGS[:3]])]
    logits[0, 3], logits[2, 3] = math.nan, math.nan
    assert Sampler()._sample_on_device(logits, rows) == Sampler().sample(logits, rows)
    greedy = [row(temperature=0)] * 4
    assert Sampler()._sample_on_device(logits[1:5], greedy) == Sampler().sample(logits[1:5], greedy)
    sampled = [row(seed=i) for i in range(4)]
    assert Sampler()._sample_on_device(logits[1:5], sampled) == Sampler().sample(logits[1:5], sampled)
