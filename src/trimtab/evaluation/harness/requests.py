"""The harness's requests in the engine's terms: generation arguments, and texts that are too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.decoding.sampling_params import SamplingParams
from trimtab.errors import RequestError, did_you_mean

# Each library's own word for the same bound, in the order in which the harness lets them win.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PASSED_ON = frozenset(
    ("frequency_penalty", "ignore_eos", "logit_bias", "min_p", "min_tokens", "presence_penalty")
    + ("repetition_penalty", "seed", "stop_token_ids", "top_k", "top_p")
)
_KNOWN = _PASSED_ON | {*_MAX_TOKENS, "until", "stop", "do_sample", "temperature", "num_beams"}


def sampling_params(generation: Mapping[str, Any], max_gen_toks: int, seed: int) -> SamplingParams:
    """Sampling parameters for a task's `generation_kwargs`; `max_gen_toks` and `seed` are defaults.

    As with the harness's own backends: greedy unless `do_sample` or a temperature asks for sampling, and
    `do_sample: false` wins over a temperature. Stop texts are looked for in the text with its special
    tokens, so that `<|im_end|>` and the like are found. Raises RequestError for arguments that nothing here
    would act on.
    """
    given = {key: value for key, value in generation.items() if value is not None}
    for name in given:
        if name not in _KNOWN:
            raise RequestError(f"unknown generation argument {name!r}.{did_you_mean(name, _KNOWN)}")
    if given.get("num_beams", 1) != 1:
        raise RequestError(f"num_beams is {given['num_beams']!r}; beam search is not implemented, leave it 1")
    sample = given.get("do_sample")
    temperature = given.get("temperature", 1.0 if sample else 0.0)
    return SamplingParams(
        max_tokens=next((given[name] for name in _MAX_TOKENS if name in given), max_gen_toks),
        temperature=0.0 if sample is False else temperature,
        stop=stop_texts(given),
        skip_special_tokens=False,
        **{"seed": seed, **{name: given[name] for name in _PASSED_ON if name in given}},
    )


def stop_texts(generation: Mapping[str, Any]) -> list[str]:
    """The texts that end a generation, from `until` and `stop`, each a text or a list of them."""
    texts: list[str] = []
    for name in ("until", "stop"):
        value = generation.get(name) or []
        for text in [value] if isinstance(value, str) else value:
            if not isinstance(text, str):
                raise RequestError(f"{name} is {value!r}; it must be a text or a list of texts")
            if text and text not in texts:
                texts.append(text)
    return texts


def fitted_prompt(ids: Sequence[int], max_length: int, max_tokens: int | None) -> list[int]:
    """The end of a prompt that leaves room for what is to be generated."""
    room = max_length - (max_tokens or 1)
    if room < 1:
        raise RequestError(
            f"max_gen_toks is {max_tokens}, which leaves no room for a prompt in {max_length} tokens; "
            "lower it, or raise max_length"
        )
    return list(ids[-room:])


def fitted_pair(
    context: Sequence[int], continuation: Sequence[int], max_length: int
) -> tuple[list[int], list[int]]:
    """Context and continuation, the context cut at its left so that the model reads `max_length` tokens.

    The last token is predicted but never read, so together they have one token more.
    """
    if len(continuation) > max_length:
        raise RequestError(
            f"a continuation has {len(continuation)} tokens and the model reads {max_length} at most; "
            "shorten it"
        )
    return list(context[-(max_length + 1 - len(continuation)) :]), list(continuation)
