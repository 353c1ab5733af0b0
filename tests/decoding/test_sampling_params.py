"""Wrong sampling values are refused with the field, the value and what is allowed."""

import math
import pickle

import numpy as np
import pytest

from trimtab.decoding.sampling_params import SamplingParams
from trimtab.errors import RequestError

REFUSED = [
    ("n", 0, "at least 1"),
    ("n", 1.5, "whole number"),
    ("n", True, "whole number"),
    ("best_of", 0, "at least 1"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", -5, "at least 1"),
    ("max_tokens", "many", "whole number"),
    ("min_tokens", -1, "at least 0"),
    ("min_tokens", 17, "max_tokens is 16"),
    ("temperature", -0.1, "at least 0"),
    ("temperature", math.nan, "number"),
    ("temperature", math.inf, "number"),
    ("temperature", "hot", "number"),
    ("temperature", None, "number"),
    ("top_p", 0.0, "above 0 and at most 1"),
    ("top_p", 1.01, "at most 1"),
    ("top_p", math.nan, "number"),
    ("top_k", -2, "at least -1"),
    ("top_k", 2.5, "whole number"),
    ("min_p", -0.01, "at least 0"),
    ("min_p", 1.5, "at most 1"),
    ("stop", [""], "empty"),
    ("stop", "", "empty"),
    ("stop", [1], "text"),
    ("stop", 7, "text"),
    ("stop_token_ids", [-1], "at least 0"),
    ("stop_token_ids", ["x"], "whole numbers"),
    ("stop_token_ids", "2", "list"),
    ("ignore_eos", "yes", "true or false"),
    ("skip_special_tokens", 1, "true or false"),
    ("include_stop_str_in_output", None, "true or false"),
    ("seed", 1.5, "whole number"),
    ("logprobs", -1, "from 0 to 20"),
    ("logprobs", 21, "from 0 to 20"),
    ("prompt_logprobs", 21, "from 0 to 20"),
    ("logit_bias", {"word": 1.0}, "token ids"),
    ("logit_bias", {-1: 1.0}, "token ids"),
    ("logit_bias", {5: math.nan}, "-100 to 100"),
    ("logit_bias", {5: 101}, "-100 to 100"),
    ("logit_bias", [5], "map"),
    ("presence_penalty", 2.1, "at most 2"),
    ("frequency_penalty", -2.1, "at least -2"),
    ("repetition_penalty", 5e-324, "at least 0.01 and at most 100"),
    ("repetition_penalty", math.inf, "number"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED, ids=lambda v: str(v)[:20])
def test_refused(name, value, allowed):
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert name in str(error.value)
    assert allowed in str(error.value)


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.temperature, params.top_p) == (1, 16, 1.0, 1.0)
    assert params.top_k in (0, -1)
    assert (params.min_p, params.repetition_penalty, params.seed, params.logprobs) == (0.0, 1.0, None, None)
    assert params.skip_special_tokens and not params.ignore_eos


def test_values_are_brought_to_one_form():
    params = SamplingParams(
        stop="end",
        stop_token_ids=[3, np.int64(4)],
        logit_bias={"7": 1, 8: -1.5},
        temperature=1,
        top_k=np.int32(5),
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {7: 1.0, 8: -1.5}
    assert type(params.temperature) is float and type(params.top_k) is int
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_best_of():
    assert SamplingParams(n=2).num_samples == 2
    assert SamplingParams(n=2, best_of=5).num_samples == 5
    with pytest.raises(RequestError, match="best_of is 2 but n is 3"):
        SamplingParams(n=3, best_of=2)


def test_greedy():
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy
    assert SamplingParams(temperature=0).is_plain_greedy
    for setting in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {1: 1.0}},
        {"logprobs": 0},
    ):
        assert not SamplingParams(temperature=0, **setting).is_plain_greedy


def test_check_against_the_vocabulary():
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9]).check(10)
    with pytest.raises(RequestError, match=r"logit_bias names token id 10; .* 0 to 9"):
        SamplingParams(logit_bias={10: 1.0}).check(10)
    with pytest.raises(RequestError, match="stop_token_ids names token id 10"):
        SamplingParams(stop_token_ids=[10]).check(10)


def test_frozen_equal_and_picklable():
    params = SamplingParams(seed=-3, logit_bias={1: 2.0})
    with pytest.raises(AttributeError):
        params.seed = 4  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(params)) == params
    assert params == SamplingParams(seed=-3, logit_bias={1: 2.0})
