"""What a user can get wrong: one clear sentence each, and an engine that goes on working."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab
from engine.fakes import tiny_model
from kvcache.policies import CONTEXT, make_engine, params, results, small_model, text
from trimtab.errors import ConfigError, NumericsError, PlanError, RequestError
from trimtab.models.shapes import random_model, shape

GOOD = text(12, 1)


@pytest.fixture(scope="module")
def engine() -> trimtab.Engine:
    return make_engine("full")


@pytest.fixture(scope="module")
def expected() -> Any:
    return results(make_engine("full"), [GOOD])


@pytest.mark.parametrize(
    "prompt,message",
    [
        ([], "the prompt is empty"),
        ([5, 160], "token id 160; the model's ids are 0 to 159"),
        ([5, -1], "token id -1"),
        ([5, 1.5], "whole numbers"),
        ([5, "a"], "whole numbers"),
        ("some text", "no tokenizer"),
        (text(CONTEXT), f"fills the model's context of {CONTEXT}"),
        (text(CONTEXT + 1), f"has {CONTEXT + 1} tokens and the model's context is {CONTEXT}"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_prompts_that_cannot_be_served(
    engine: trimtab.Engine, expected: Any, prompt: Any, message: str
) -> None:
    for prompts in ([prompt], [GOOD, prompt]):
        with pytest.raises(RequestError, match=message) as error:
            engine.generate(prompts, params())
        assert "\n" not in str(error.value)
        assert not engine.scheduler.has_work and engine.cache.bytes_held == 0
    with pytest.raises(RequestError, match=message):
        next(engine.stream(prompt, params()))
    assert results(engine, [GOOD]) == expected


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(stop=["x"]), "stop texts need a tokenizer"),
        (dict(logit_bias={160: 1.0}), "logit_bias names token id 160"),
        (dict(stop_token_ids=[999]), "stop_token_ids names token id 999"),
    ],
)
def test_settings_the_model_cannot_have(
    engine: trimtab.Engine, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate([GOOD], params(**settings))
    assert not engine.scheduler.has_work


def test_as_many_settings_as_prompts(engine: trimtab.Engine) -> None:
    with pytest.raises(RequestError, match="2 prompts and 1 SamplingParams"):
        engine.generate([GOOD, GOOD], [params()])
    assert engine.generate([], params()) == []


def test_scores_of_nothing_or_too_much(engine: trimtab.Engine) -> None:
    for pair, message in (
        ((GOOD, []), "continuation to score is empty"),
        (([], GOOD), "prompt is empty"),
        ((GOOD, [400]), "token id 400"),
        ((GOOD, text(CONTEXT)), "text to score has"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.score([(GOOD, GOOD), pair])
        assert not engine.scheduler.has_work


def test_numpy_token_ids_are_token_ids(engine: trimtab.Engine, expected: Any) -> None:
    import numpy as np

    ids = np.array(GOOD)
    for prompts in (list(ids), [list(ids)]):
        out = engine.generate(prompts, params())[0]
        assert out.token_ids == expected[0][0] and all(type(t) is int for t in out.prompt_token_ids)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_weights_that_are_not_numbers_hurt_only_who_uses_them(backend: str) -> None:
    """One row of the embedding is NaN: texts with that token fail, the others keep their bits."""
    model = random_model(small_model().config, seed=3)
    model.load_state_dict(small_model().state_dict())
    sane = make_engine("full", backend, model=model)
    others = [text(n, n) for n in (7, 30)]
    others = [[t if t != 99 else 98 for t in prompt] for prompt in others]
    settings = params(logit_bias={99: -100})
    expected = [o.token_ids for o in sane.generate(others, settings)]
    head = torch.nn.Linear(64, 160, bias=False)
    head.weight.data = model.model.embed_tokens.weight.data.clone()
    broken = random_model(shape_untied(), seed=3)
    broken.load_state_dict(small_model().state_dict() | {"lm_head.weight": head.weight.data})
    with torch.no_grad():
        broken.model.embed_tokens.weight[99] = torch.nan
    engine = make_engine("full", backend, model=broken, prefix_caching=False)
    bad = [3, 4, 99, 5]
    with pytest.raises(NumericsError, match=r"not numbers.*check the weights"):
        engine.generate([bad], settings)
    with pytest.raises(NumericsError):
        engine.score([(bad, [3, 4])])
    for order in ([others[0], bad, others[1]], [bad, *others]):
        requests = [engine.submit(p, settings)[0] for p in order]
        while engine.scheduler.has_work:
            engine.step()
        done = {r.finish_reason: 0 for r in requests}
        assert set(done) == {"error", "length"}
        good = [r.output_ids for r in requests if r.finish_reason == "length"]
        assert good == expected
    assert engine.cache.bytes_held == 0
    assert [o.token_ids for o in engine.generate(others, settings)] == expected


def shape_untied() -> Any:
    from trimtab.models.config import config_from_dict

    return config_from_dict(dict(small_model().config.raw) | {"tie_word_embeddings": False})


def test_an_endless_cache_still_asks_how_far_to_go() -> None:
    engine = make_engine("streaming:sinks=4,window=60")
    long = text(CONTEXT + 50)
    with pytest.raises(RequestError, match="give max_tokens"):
        engine.generate([long], params(max_tokens=None))
    assert len(engine.generate([long], params(max_tokens=30))[0].token_ids) == 30


@pytest.mark.parametrize(
    "cache,message",
    [
        ("streaming:sinks=400,window=400", "sinks . window is 800, more than the model's context of 600"),
        ("kivi:group_size=32", "group_size=32 does not divide the model's head size 16"),
    ],
)
def test_policies_that_do_not_fit_the_model(cache: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_engine(cache)


@pytest.mark.parametrize("cache", ["streaming", "kivi:group_size=16,residual=16", "h2o", "snapkv"])
def test_policies_that_forget_and_windows_of_the_model(cache: str) -> None:
    from trimtab.models.config import config_from_dict

    raw = dict(shape("125m", vocab_size=64, hidden_size=32, num_attention_heads=2, num_key_value_heads=2).raw)
    raw |= dict(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=32, num_hidden_layers=1
    )
    with pytest.raises(PlanError, match="sliding-window layers"):
        trimtab.Engine(random_model(config_from_dict(raw)), cache=cache, backend="torch")


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(kv_memory=100), "kv_memory is 100 B.*give at least 2.0 KiB"),
        (dict(cahce="full"), "unknown setting 'cahce'.*Did you mean 'cache'"),
        (dict(cache="kiwi"), "unknown cache method 'kiwi'.*Did you mean 'kivi'"),
        (dict(max_batch=0), "max_batch is 0"),
    ],
)
def test_engine_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trimtab.Engine(tiny_model(), backend="torch", **options)


def test_scaled_rope_stretches_the_context() -> None:
    from trimtab.models.config import config_from_dict

    raw = dict(tiny_model().config.raw) | {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}
    config = config_from_dict(raw)
    assert (config.max_position_embeddings, config.context_length) == (256, 640)
    assert tiny_model().config.context_length == 256
    engine = trimtab.Engine(random_model(config), backend="torch", kv_memory="1MiB")
    prompt = [3 + i % 40 for i in range(630)]
    [out] = engine.generate([prompt], params(max_tokens=None))
    assert len(out.token_ids) == 10 and out.finish_reason == "length"
