"""`/v1/completions` through the official client: every text and number is the engine's own."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.resources.completions import Completions

from serving.server import Server
from trimtab import Engine, SamplingParams
from trimtab.serving.completions import CompletionCall
from trimtab.serving.models import ServedModel
from trimtab.serving.protocol import CompletionRequest

PROMPT = "The old captain looked at the sea and said"
STANDARD = inspect.signature(Completions.create).parameters
OTHER = "A recipe for bread:"


def complete(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in list(fields) if name not in STANDARD}
    return client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=0.0, max_tokens=12),
        dict(seed=3, max_tokens=12),
        dict(seed=4, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, max_tokens=12),
        dict(seed=5, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.3, max_tokens=12),
        dict(seed=6, logit_bias={"300": 5.0, "265": -100}, max_tokens=12),
        dict(seed=7, min_tokens=12, max_tokens=12, n=3),
        dict(seed=8, ignore_eos=True, skip_special_tokens=False, max_tokens=12),
    ],
)
def test_texts_are_those_of_the_engine(client: OpenAI, reference: Engine, fields: dict[str, Any]) -> None:
    (wanted,) = reference.generate(PROMPT, SamplingParams(**fields))
    answer = complete(client, **fields)
    assert [choice.text for choice in answer.choices] == [out.text for out in wanted.outputs]
    assert [choice.finish_reason for choice in answer.choices] == [o.finish_reason for o in wanted.outputs]
    assert [choice.index for choice in answer.choices] == list(range(len(wanted.outputs)))


def test_several_prompts_each_with_n_texts(client: OpenAI, reference: Engine) -> None:
    wanted = reference.generate([PROMPT, OTHER], SamplingParams(seed=1, n=2, max_tokens=6))
    answer = complete(client, [PROMPT, OTHER], seed=1, n=2, max_tokens=6)
    assert [c.text for c in answer.choices] == [o.text for out in wanted for o in out.outputs]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    prompt_tokens = sum(len(out.prompt_token_ids) for out in wanted)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (
        prompt_tokens,
        prompt_tokens + answer.usage.completion_tokens,
    )
    assert answer.usage.completion_tokens == sum(len(o.token_ids) for out in wanted for o in out.outputs)


def test_prompts_of_token_ids(client: OpenAI, reference: Engine) -> None:
    ids = reference.model.tokenizer.encode(PROMPT)
    params = SamplingParams(temperature=0.0, max_tokens=5)
    texts = [out.text for out in reference.generate([ids, ids[:4]], params)]
    assert complete(client, ids, temperature=0, max_tokens=5).choices[0].text == texts[0]
    answer = complete(client, [ids, ids[:4]], temperature=0, max_tokens=5)
    assert [choice.text for choice in answer.choices] == texts


def test_logprobs_are_those_of_the_engine(client: OpenAI, reference: Engine) -> None:
    params = SamplingParams(seed=2, max_tokens=8, logprobs=3)
    (wanted,) = reference.generate(PROMPT, params)
    answer = complete(client, seed=2, max_tokens=8, logprobs=3)
    found, text = answer.choices[0].logprobs, answer.choices[0].text
    assert text == wanted.text
    assert found.token_logprobs == [entry.logprob for entry in wanted.logprobs]
    tokenizer = reference.model.tokenizer
    names = [tokenizer.decode([i], skip_special_tokens=False) for i in wanted.token_ids]
    assert found.tokens == names
    assert found.text_offset[0] == 0
    assert all(text.startswith(t, o) for t, o in zip(found.tokens, found.text_offset, strict=True))
    for entry, top in zip(wanted.logprobs, found.top_logprobs, strict=True):
        best = {tokenizer.decode([i], skip_special_tokens=False): logprob for i, logprob in entry.top}
        assert best.items() <= top.items() and len(top) <= 4
        assert tokenizer.decode([entry.token_id], skip_special_tokens=False) in top


def test_logprobs_zero_reports_the_chosen_token_alone(client: OpenAI) -> None:
    found = complete(client, seed=2, max_tokens=3, logprobs=0).choices[0].logprobs
    pairs = zip(found.tokens, found.token_logprobs, strict=True)
    assert found.top_logprobs == [{token: logprob} for token, logprob in pairs]


def test_parts_of_characters_are_told_as_bytes(client: OpenAI, reference: Engine) -> None:
    tokenizer = reference.model.tokenizer
    # Two halves of "é" and then "a", forced one after the other by a choice of one.
    answer = complete(client, max_tokens=8, logprobs=0, structured_outputs={"choice": ["éa"]})
    choice = answer.choices[0]
    assert choice.text == "éa"
    split = [token for token in choice.logprobs.tokens if token.startswith("bytes:\\x")]
    whole = len(tokenizer.encode("é", add_special_tokens=False)) == 1
    assert bool(split) != whole
    at = dict(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    assert all(at[token] == 0 for token in split) and at["a"] == 1


def test_echo_with_the_log_probabilities_of_the_prompt(client: OpenAI, reference: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=2)
    (wanted,) = reference.generate(PROMPT, params)
    choice = complete(client, temperature=0, max_tokens=4, logprobs=2, echo=True).choices[0]
    assert choice.text == PROMPT + wanted.text
    found = choice.logprobs
    entries = [*wanted.prompt_logprobs, *wanted.logprobs]
    assert found.token_logprobs == [None if e is None else e.logprob for e in entries]
    assert found.top_logprobs[0] is None
    special = wanted.prompt_token_ids[0]  # stands for no text
    assert found.text_offset[:2] == [0, 0]
    assert found.tokens[0] == reference.model.tokenizer.id_to_token(special)
    pairs = zip(found.tokens[1:], found.text_offset[1:], strict=True)
    assert all(choice.text.startswith(token, offset) for token, offset in pairs)


def test_echo_alone_scores_a_prompt(client: OpenAI, reference: Engine) -> None:
    ids = reference.model.tokenizer.encode(PROMPT)
    scored = reference.score([(ids[:3], ids[3:])])[0].logprobs
    answer = complete(client, ids, max_tokens=0, logprobs=1, echo=True)
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs.token_logprobs[3:] == pytest.approx(scored, abs=1e-4)
    assert len(choice.logprobs.tokens) == len(ids)
    assert (choice.finish_reason, answer.usage.completion_tokens) == ("length", 0)


def test_best_of_returns_the_likeliest(client: OpenAI, reference: Engine) -> None:
    (wanted,) = reference.generate(PROMPT, SamplingParams(seed=9, n=2, best_of=5, max_tokens=5))
    answer = complete(client, seed=9, n=2, best_of=5, max_tokens=5)
    assert [choice.text for choice in answer.choices] == [out.text for out in wanted.outputs]
    assert answer.usage.completion_tokens == 25  # all five were made


def test_stop_texts_and_tokens(client: OpenAI, reference: Engine) -> None:
    (free,) = reference.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=12))
    stop = free.text[8:11]
    choice = complete(client, temperature=0, max_tokens=12, stop=[stop, "never seen"]).choices[0]
    assert choice.text == free.text[: free.text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    kept = complete(client, temperature=0, max_tokens=12, stop=stop, include_stop_str_in_output=True)
    assert kept.choices[0].text == choice.text + stop
    token = free.token_ids[5]
    first = free.token_ids.index(token)
    ended = complete(client, temperature=0, max_tokens=12, stop_token_ids=[token], return_token_ids=True)
    assert ended.choices[0].stop_reason == token
    assert ended.choices[0].token_ids == free.token_ids[: first + 1]
    assert ended.choices[0].prompt_token_ids == free.prompt_token_ids


def test_sixteen_tokens_unless_told_or_full(client: OpenAI, reference: Engine) -> None:
    assert complete(client, ignore_eos=True).usage.completion_tokens == 16
    full = [5] * (reference.model.config.context_length - 3)
    body = CompletionRequest(model="tiny", prompt=[[5], full])
    call = CompletionCall("id", body, ServedModel("tiny", "tiny", reference))
    asyncio.run(call.prepare())
    assert [params.max_tokens for params in call.params] == [16, 3]


def test_prompt_logprobs(client: OpenAI, reference: Engine) -> None:
    (wanted,) = reference.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=2))
    found = complete(client, max_tokens=1, prompt_logprobs=2).choices[0].prompt_logprobs
    assert found[0] is None
    tokenizer = reference.model.tokenizer
    for entry, told in zip(wanted.prompt_logprobs[1:], found[1:], strict=True):
        own = told[str(entry.token_id)]
        assert own["logprob"] == entry.logprob
        assert own["decoded_token"] == tokenizer.decode([entry.token_id], skip_special_tokens=False)
        ranks = {told[str(token)]["rank"] for token, _ in entry.top}
        assert ranks == {1, 2}
        assert (own["rank"] is None) == (entry.token_id not in [token for token, _ in entry.top])


def test_cached_tokens_and_what_it_cost(client: OpenAI, server: Server) -> None:
    prompt = "cached " * 40
    complete(client, prompt, max_tokens=2)
    answer = complete(client, prompt, max_tokens=4, ignore_eos=True, n=2)
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached >= 16 and cached % 16 == 0
    cost = answer.trimtab
    assert cost["cached_prompt_tokens"] == cached
    assert cost["plan"] == str(server.engines["tiny"].plan)
    assert cost["kv_bytes_peak"] >= cost["kv_bytes_held"] > 0
    assert 0 <= cost["queue_s"] <= cost["ttft_s"] and cost["tokens_per_s"] > 0
    assert (cost["preemptions"], cost["notes"]) == (0, [])


def test_the_id_is_in_the_header(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model="tiny", prompt=PROMPT, max_tokens=1)
    answer = raw.parse()
    assert raw.headers["x-request-id"] == answer.id and answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.system_fingerprint.startswith("trimtab-")


def test_plans_differ_in_name_numbers_and_fingerprint(client: OpenAI) -> None:
    prompt = "Once there was a number: " + "17 92 4 " * 60
    both = [
        client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=4, logprobs=0)
        for name in ("tiny", "tiny:kivi:bits=2")
    ]
    assert [answer.model for answer in both] == ["tiny", "tiny:kivi:bits=2"]
    logprobs = [answer.choices[0].logprobs.token_logprobs for answer in both]
    assert logprobs[0] != logprobs[1]
    assert both[0].system_fingerprint != both[1].system_fingerprint


def test_structured_outputs(client: OpenAI) -> None:
    answer = complete(client, structured_outputs={"regex": "[0-9]{3}-[a-c]{2}"}, max_tokens=20)
    head, tail = answer.choices[0].text.split("-")
    assert head.isdigit() and len(head) == 3 and set(tail) <= set("abc") and len(tail) == 2
    with pytest.raises(BadRequestError) as refused:
        complete(client, structured_outputs={"regex": "a", "choice": ["b"]})
    assert "exactly one" in refused.value.message
