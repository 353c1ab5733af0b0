"""What dropping rows is for: budgets of every kind, peaks that fall, and memory that others really get."""

from __future__ import annotations

import pytest
import torch
import yaml

import trimtab
from kvcache.policies import feed, make_engine, params, text
from trimtab.errors import ConfigError
from trimtab.kvcache.paging.budget import Share
from trimtab.kvcache.paging.evicting import Evicting
from trimtab.models.shapes import shape
from trimtab.registry import KV_CACHES

METHODS = ("h2o", "snapkv", "expected_attention", "adakv")


@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_the_prompt_is_written_and_read_back(method: str) -> None:
    plan = trimtab.Plan(cache=f"{method}:budget=12.5%,chunk=64")
    assert plan.cache.options.budget == Share(12.5) and plan.cache.options.chunk == 64
    assert "budget=12.5%" in str(plan)
    assert trimtab.Plan.parse(str(plan)) == plan
    assert trimtab.Plan.from_dict(yaml.safe_load(plan.to_yaml())) == plan
    assert trimtab.Plan(cache=f"{method}:budget=100").cache.options.budget == 100


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("snapkv:budget=a", "option 'budget' of cache method 'snapkv' is 'a'; write rows such as 256, or"),
        ("h2o:budget=0%", "is '0%'; write rows"),
        ("expected_attention:budget=101%", "is '101%'; write rows"),
        ("snapkv:budget=32", r"'budget' of snapkv is 32; it must be above the window \(32\)"),
        ("expected_attention:budget=4", r"'budget' of expected_attention is 4; .* above the sinks \(4\)"),
        ("adakv:budget=30", r"'budget' of adakv is 30; .* above what snapkv protects \(32\)"),
        ("h2o:budget=1", "'budget' of h2o is 1"),
        ("snapkv:chunk=0", "option 'chunk' of snapkv is 0; it must be at least 1, or none"),
        ("adakv:interval=-1", "option 'interval' of adakv is -1"),
        ("adakv:safeguard=1.5", "'safeguard' of adakv is 1.5; it must be from 0 to 1"),
        ("adakv:scorer=h2o", "'scorer' of adakv is 'h2o'; allowed: snapkv, expected_attention"),
        ("adakv:scorer='snapkv:budget=9'", "give 'budget' to adakv itself"),
        ("adakv:scorer='snapkv:windw=9'", "unknown option 'windw' .* Did you mean 'window'"),
        ("expected_attention:future=0", "'future' of expected_attention is 0; it must be at least 1"),
    ],
)
def test_a_wrong_budget_is_one_clear_sentence(cache: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trimtab.Plan(cache=cache)


@pytest.mark.parametrize("method", METHODS)
def test_sliding_windows_are_refused(method: str) -> None:
    windowed = shape("125m", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=64)
    [reason] = trimtab.Plan(cache=method).problems(windowed)
    assert "sliding-window layers already forget" in reason
    assert not trimtab.Plan(cache=method).problems(shape("125m"))


@pytest.mark.parametrize("method", METHODS)
def test_dropping_again_while_decoding_is_what_packed_rows_must_bear(method: str) -> None:
    cls = KV_CACHES.get(method).cls
    options = KV_CACHES.build_options
    assert cls.drops_settled(options(method, {})) == (method == "h2o")
    if method != "h2o":
        assert cls.drops_settled(options(method, {"interval": 8}))


@pytest.mark.parametrize("method", METHODS)
def test_chunks_lower_the_peak_of_a_long_prompt(method: str) -> None:
    peaks = {}
    for chunk in ("none", "64"):
        engine = make_engine(f"{method}:budget=64,chunk={chunk}", max_step_tokens=200)
        engine.generate([text(520)], params(max_tokens=4))
        peaks[chunk] = engine.stats().kv_bytes_peak
    assert peaks["64"] < 0.5 * peaks["none"]


@pytest.mark.parametrize("method", METHODS)
def test_intervals_bound_what_a_long_answer_holds(method: str) -> None:
    option = "" if method == "h2o" else ",interval=16"
    engine = make_engine(f"{method}:budget=48{option}")
    request = feed(engine, text(100))
    cache = engine.cache
    assert isinstance(cache, Evicting) and request.sequence is not None
    most = 0
    for _ in range(90):
        engine.step()
        most = max(most, int(cache.rows.length[request.sequence.slot].sum()))
    assert most <= (48 + 16) * 4, "rows of two layers with two heads each"


@pytest.mark.parametrize("scorer", ["snapkv:window=8", "expected_attention"])
def test_heads_differ_and_what_one_loses_is_free_for_others(scorer: str) -> None:
    engine = make_engine(f"adakv:budget=96,safeguard=0.1,scorer='{scorer}'")
    request = feed(engine, text(500, 3))
    cache = engine.cache
    assert isinstance(cache, Evicting) and request.sequence is not None
    length = cache.rows.length[request.sequence.slot]
    assert (length.sum(1) == 2 * 96).all(), "a layer keeps its budget"
    assert length.unique().numel() > 1 and int(length.min()) >= 9, (
        "heads differ, none goes below its safeguard"
    )
    pages = (length + 15) // 16
    page = 16 * cache.shape.row_bytes
    assert cache.held_by(request.sequence) == int(pages.sum()) * page
    other = feed(engine, text(40, 4))
    assert other.sequence is not None
    assert cache.bytes_held == cache.held_by(request.sequence) + 4 * 3 * page
    engine.cancel([request])
    assert cache.bytes_held == cache.held_by(other.sequence) == 4 * 3 * page


def test_memory_that_a_prompt_gave_back_serves_the_next_one() -> None:
    """Room for one whole prompt and a few compressed ones: they run together, each in what others freed."""
    token = 2 * 2 * 2 * 16 * 4
    engine = make_engine("adakv:budget=48,scorer='snapkv:window=8'", kv_memory=(304 + 5 * 96) * token)
    requests = [engine.submit(text(300, i), params(max_tokens=30))[0] for i in range(5)]
    together = 0
    while engine.scheduler.has_work:
        engine.step()
        together = max(together, sum(r.computed >= 300 for r in engine.scheduler.running))
    assert together >= 3 and 5 * 300 * token > engine.stats().kv_bytes_capacity
    assert [r.finish_reason for r in requests] == ["length"] * 5


@pytest.mark.parametrize(
    "cache", ["snapkv:budget=48,interval=40", "expected_attention:budget=48,interval=100"]
)
def test_steps_between_two_droppings_keep_no_queries(cache: str) -> None:
    engine = make_engine(cache)
    feed(engine, text(100))
    asked = []
    for _ in range(100):
        engine.step()
        asked.append(engine.cache.asked is not None)
    window = 32 if cache.startswith("snapkv") else 64
    interval = 40 if cache.startswith("snapkv") else 100
    # The prompt ended at a commit; the token of step i is number i of the answer.
    assert asked == [i % interval >= interval - window for i in range(100)]


def test_moments_have_the_same_bits_in_any_steps() -> None:
    seen = []
    for step in (500, 7, 33):
        engine = make_engine("expected_attention:budget=48,interval=1000", max_step_tokens=step)
        seen.append(feed(engine, text(100)).sequence.notes)  # type: ignore[union-attr]
    for notes in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], notes, strict=True))
