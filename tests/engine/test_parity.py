"""The engine against `transformers`: every family and rope scaling, both backends, and the shipped model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from kernels.libraries import native_kernels
from models.tiny_models import CASES, Tiny, make, oracle

TOLERANCE = 1e-4


def wider(case: Tiny) -> Tiny:
    """The same switches with heads of 16, which the C++ kernels can run."""
    config = case.config | dict(hidden_size=64)
    if "head_dim" in config:
        config["head_dim"] = 32 if config["head_dim"] > 16 else 16
    return replace(case, config=config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wider")
    return {name: make(wider(case), root / name) for name, case in CASES.items()}


@torch.no_grad()
def true_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] of every next token, the whole text computed at once, in float64."""
    return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


@torch.no_grad()
def true_steps(folder: Path, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Log-probabilities [len(output), V]: the prompt at once, then token by token, as `generate` does."""
    model = oracle(folder)  # fresh: its dynamic rope scaling remembers longer calls
    step = model(torch.tensor([prompt]), use_cache=True)
    found = [step.logits[0, -1]]
    for token in output[:-1]:
        step = model(torch.tensor([[token]]), past_key_values=step.past_key_values, use_cache=True)
        found.append(step.logits[0, -1])
    return torch.stack(found).double().log_softmax(-1)


def assert_greedy(tokens: list[int], logprobs: list[float], truth: torch.Tensor) -> None:
    for token, logprob, row in zip(tokens, logprobs, truth, strict=True):
        assert abs(logprob - float(row[token])) < TOLERANCE
        assert float(row.max() - row[token]) < TOLERANCE, "not the likeliest, nor as good as"


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_every_family(folders: dict[str, Path], name: str, backend: str) -> None:
    model = trimtab.load(folders[name])
    if backend == "native":
        native_kernels()
        if model.config.moe is not None:
            pytest.skip("the C++ kernels run dense MLPs; mixtures of experts are tested on torch")
    engine = trimtab.Engine(model, backend=backend, threads=1, max_step_tokens=37, kv_memory="16MiB")
    g = torch.Generator().manual_seed(1)
    # One text crosses the length at which scaled rotary embeddings change; chunks of 37 cut all of them.
    lengths = (9, min(CASES[name].length, model.config.context_length) - 12)
    prompts = [torch.randint(3, 96, (n,), generator=g).tolist() for n in lengths]
    params = trimtab.SamplingParams(
        max_tokens=10, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    for prompt, out in zip(prompts, engine.generate(prompts, params), strict=True):
        assert out.logprobs is not None and out.prompt_logprobs is not None
        truth = true_steps(folders[name], prompt, out.token_ids)
        assert_greedy(out.token_ids, [x.logprob for x in out.logprobs], truth)
        whole = true_logits(oracle(folders[name]), prompt)
        for i, noted in enumerate(out.prompt_logprobs[1:]):
            assert noted is not None
            assert abs(noted.logprob - float(whole[i, prompt[i + 1]])) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-dynamic", "mistral-window", "llama3"])
def test_prefix_hits_and_preemption_keep_the_numbers(folders: dict[str, Path], name: str) -> None:
    """Sharing and recomputing where keys depend on the text's length, or where windows are short."""
    native_kernels()
    model = trimtab.load(folders[name])
    g = torch.Generator().manual_seed(2)
    base = (
        torch.randint(3, 96, (100,), generator=g).tolist() if name != "mistral-window" else list(range(3, 48))
    )
    prompts = [base, base[:33], [*base, 5, 6, 7], base]
    params = trimtab.SamplingParams(max_tokens=15, temperature=0, ignore_eos=True, logprobs=0)
    rows = 16 * model.kv_bytes_per_token()
    engine = trimtab.Engine(model, backend="native", threads=1, max_step_tokens=29, kv_memory=11 * rows)
    outputs = engine.generate(prompts, params) + engine.generate(prompts, params)
    assert engine.stats().preemptions or name == "mistral-window"
    assert (engine.stats().prefix_hit_tokens > 0) == (name != "llama-dynamic")
    for prompt, out in zip(prompts + prompts, outputs, strict=True):
        truth = true_steps(folders[name], prompt, out.token_ids)
        assert_greedy(out.token_ids, [x.logprob for x in out.logprobs or ()], truth)


COUNT = 40
PROMPTS = [
    "Once upon a time",
    "It was a dark night, and",
    "The captain looked at the sea and said",
    "What is the age of Rose Marsh?",
    "<|user|>Write as JSON: In Oslo lives Paul Fox, a tailor aged 81.<|end|><|assistant|>",
    "<|user|>Write a Python function solve that returns x minus a.<|end|><|assistant|>",
    "<|user|>Say in capitals: the king is here<|end|><|assistant|>",
    "Mr. Pickwick",
    "CHAPTER I.",
    "1 2 3 4 5 6",
    "é",
    "The whale " * 60,
]


@pytest.fixture(scope="module")
def shipped() -> tuple[trimtab.Model, Any]:
    model = trimtab.load(dtype="float32")
    assert model.path is not None
    return model, oracle(model.path)


@pytest.fixture(scope="module")
def their_texts(shipped: tuple[trimtab.Model, Any]) -> list[list[int]]:
    model, reference = shipped
    assert model.tokenizer is not None
    return [their_text(reference, model.tokenizer.encode(text)) for text in PROMPTS]


def their_text(reference: Any, prompt: list[int], **options: Any) -> list[int]:
    """What `transformers.generate` writes after a prompt, greedily."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = reference.generate(ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_greedy_text_of_the_shipped_model(
    shipped: tuple[trimtab.Model, Any], their_texts: list[list[int]], backend: str
) -> None:
    """Token for token what `transformers.generate` gives; where two tokens are as good, either may come."""
    model, reference = shipped
    if backend == "native":
        native_kernels()
    engine = trimtab.Engine(model, backend=backend, threads=1, max_batch=8, kv_memory="64MiB")
    params = trimtab.SamplingParams(max_tokens=COUNT, temperature=0, logprobs=0)
    equal = 0
    for text, theirs, out in zip(PROMPTS, their_texts, engine.generate(PROMPTS, params), strict=True):
        prompt = out.prompt_token_ids
        truth = true_logits(reference, prompt + out.token_ids)[len(prompt) - 1 : -1]
        assert_greedy(out.token_ids, [x.logprob for x in out.logprobs or ()], truth)
        equal += out.token_ids == theirs
        if out.token_ids != theirs:
            first = next(i for i, (a, b) in enumerate(zip(out.token_ids, theirs, strict=False)) if a != b)
            assert abs(truth[first, theirs[first]] - truth[first, out.token_ids[first]]) < TOLERANCE, text
        assert out.finish_reason == ("stop" if out.token_ids[-1] in model.config.eos_token_ids else "length")
    assert equal >= len(PROMPTS) - 1


@pytest.mark.slow
def test_greedy_text_over_many_prompts(shipped: tuple[trimtab.Model, Any]) -> None:
    """A hundred prompts cut from the tokenizer's own vocabulary, whole against `generate`."""
    native_kernels()
    model, reference = shipped
    assert model.tokenizer is not None
    g = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(10, 4000, (int(n),), generator=g).tolist()
        for n in torch.randint(1, 60, (100,), generator=g)
    ]
    engine = trimtab.Engine(model, threads=1, kv_memory="64MiB")
    params = trimtab.SamplingParams(max_tokens=COUNT, temperature=0, ignore_eos=True, logprobs=0)
    different = 0
    for prompt, out in zip(prompts, engine.generate(prompts, params), strict=True):
        theirs = their_text(reference, prompt, eos_token_id=None)
        if out.token_ids != theirs:
            different += 1
            truth = true_logits(reference, prompt + out.token_ids)[len(prompt) - 1 : -1]
            assert_greedy(out.token_ids, [x.logprob for x in out.logprobs or ()], truth)
    assert different <= 2


def test_half_precision_follows_float32(shipped: tuple[trimtab.Model, Any]) -> None:
    """bfloat16 weights and cache: the scores stay near those of the same weights in float32."""
    native_kernels(torch.bfloat16)
    _, reference = shipped
    half = trimtab.load(dtype="bfloat16")
    engine = trimtab.Engine(half, backend="native", threads=1, kv_memory="64MiB")
    assert half.tokenizer is not None
    text = half.tokenizer.encode(
        "It was the best of times, it was the worst of times, it was the age of wisdom. " * 6
    )
    [scored] = engine.score([(text[:40], text[40:])])
    truth = true_logits(reference, text)[39:-1]
    exact = truth.gather(1, torch.tensor(text[40:])[:, None])[:, 0]
    difference = (torch.tensor(scored.logprobs) - exact).abs()
    assert difference.mean() < 0.03 and difference.max() < 0.5
