"""The benchmarks compare like with like: llama.cpp and transformers get the very same model and work."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from trimtab import Engine, SamplingParams
from trimtab.models.shapes import random_model, shape
from trimtab.models.transformer import Model

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Model:
    config = shape(
        "125m",
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=128,
        rope_theta=5000.0,
        tie_word_embeddings=False,
    )
    return random_model(config, request.param)


def ours(model: Model, tokens: int) -> list[int]:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return Engine(model, backend="torch", threads=1).generate([PROMPT], params)[0].token_ids


def test_llama_cpp_decodes_the_exported_model(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from _llama import LlamaCpp, agreement, export

    export(model, tmp_path / "m.gguf")
    llama = LlamaCpp(tmp_path / "m.gguf", model.dtype, threads=1, context=64)
    try:
        tokens, times = llama.generate(PROMPT, 24)
        agreed = agreement(model, llama, PROMPT + tokens)
        assert times == sorted(times) and len(tokens) == 24
        # bfloat16: llama.cpp rounds activations too, and a tie of random weights may fall the other way.
        if model.dtype == torch.float32:
            assert agreed["argmax"] == 1.0
            assert tokens == ours(model, 24)
        assert llama.generate(PROMPT, 24)[0] == tokens, "the second run starts from a clean cache"
    finally:
        llama.close()


def test_a_wrong_export_is_not_timed(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    import _llama

    monkeypatch.setattr(_llama, "interleaved", lambda weight, heads: weight)
    _llama.export(model, tmp_path / "m.gguf")
    llama = _llama.LlamaCpp(tmp_path / "m.gguf", model.dtype, threads=1, context=64)
    try:
        with pytest.raises(_llama.Mismatch, match="differ from ours"):
            _llama.agreement(model, llama, PROMPT)
    finally:
        llama.close()


def test_transformers_gets_the_same_weights_and_never_stops_early(model: Model) -> None:
    pytest.importorskip("transformers")
    from _contenders import Transformers

    theirs = Transformers(model)
    for mine, other in zip(model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    for cache in ("dynamic", "static"):
        sample = theirs.run([PROMPT, PROMPT[3:]], [24, 5], cache)
        assert sample.tokens == 29  # only what was asked for is useful
        assert [len(row) for row in theirs.last] == [24, 24]
        if model.dtype == torch.float32:
            assert theirs.last[0] == ours(model, 24)


def test_turns_alternate_and_ratios_are_taken_within_a_round() -> None:
    from _common import Sample, alternate, ratio

    order: list[str] = []

    def contender(name: str, seconds: list[float]):
        times = iter(seconds)

        def run() -> Sample:
            order.append(name)
            return Sample(10, next(times))

        return run

    # The machine slows down threefold from round to round; ours stays twice as fast.
    samples = alternate({"a": contender("a", [9, 1, 3, 9]), "b": contender("b", [9, 2, 6, 18])}, rounds=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert ratio(samples["a"], samples["b"]) == pytest.approx({"median": 2.0, "min": 2.0, "max": 2.0})


def test_a_claim_that_was_not_measured_is_neither_met_nor_missed() -> None:
    from _common import Claim

    assert Claim("x", 2.0, 1.0).met is True
    assert Claim("x", 2.0, 1.0, at_most=True).met is False
    unknown = Claim("x", None, 1.0, why="no GPU")
    assert unknown.met is None
    assert "no GPU" in unknown.line()


def test_the_profile_adds_up_and_leaves_no_trace(model: Model) -> None:
    from _profile import Profile

    engine = Engine(model, backend="torch", threads=1)
    before = dict(vars(engine))
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with Profile(engine) as profile:
        engine.generate([PROMPT], params)
    parts = profile.record()
    assert {"schedule", "sample", "model in torch"} <= set(parts)
    assert all(part["mean"] >= 0 for part in parts.values())
    assert parts["schedule"]["calls"] == parts["sample"]["calls"] == 1.0
    assert vars(engine) == before | {k: vars(engine)[k] for k in ("_steps", "_tokens", "_peak")}


def test_operations_of_requests_are_those_of_their_tokens(model: Model) -> None:
    from throughput import total_flops

    from trimtab.models.costs import decode_flops, prefill_flops

    config = model.config
    alone = total_flops(config, [[1] * 5], [3])
    assert alone == prefill_flops(config, 5) + decode_flops(config, 6) + decode_flops(config, 7)
    assert total_flops(config, [[1] * 5, [1] * 5], [3, 3]) == 2 * alone


@pytest.mark.parametrize("text", ["0", "-1", "two"])
def test_counts_on_the_command_line_are_positive(text: str) -> None:
    from _common import positive

    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        positive(text)
