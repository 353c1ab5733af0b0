"""An engine that follows a script, with the shipped tokenizer, so that tasks are tested in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import trimtab
from trimtab.models.hub import find_folder
from trimtab.models.tokenizer import Tokenizer


@cache
def shipped_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(find_folder(None))


CONFIG = SimpleNamespace(
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=2048,
    context_length=2048,
    vocab_size=4096,
)


MODEL = {
    "name": "tiny",
    "architecture": "LlamaForCausalLM",
    "parameters": 5_400_000,
    "layers": 6,
    "kv_heads": 2,
    "head_dim": 64,
    "context": 2048,
    "dtype": "bfloat16",
    "kv_bytes_per_token": 3072,
}


class ScriptedEngine:
    """`answer(prompt_text) -> str` writes completions; `judge(context, continuation) -> (logprobs, greedy)`.

    Every call is noted in `calls`; every request holds 10 bytes a token; tokens arrive 0.1 s apart, the first
    after 0.5 s, times `slowness`.
    """

    backend = "scripted"
    threads = 1

    def __init__(
        self,
        answer: Callable[[str], str] = lambda prompt: "",
        judge: Callable[[list[int], list[int]], tuple[list[float], list[bool]]] | None = None,
        *,
        max_batch: int = 4,
        slowness: float = 1.0,
        hits: int = 0,
        calls: list[Any] | None = None,
    ) -> None:
        self.answer, self.judge, self.slowness, self.hits = answer, judge, slowness, hits
        self.calls: list[Any] = [] if calls is None else calls
        self.plan = SimpleNamespace(max_batch=max_batch)
        self.model: Any = SimpleNamespace(tokenizer=shipped_tokenizer(), config=CONFIG)

    def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        self.calls.append((prompts, params))
        each = params if isinstance(params, list) else [params] * len(prompts)
        return [self._complete(p, s) for p, s in zip(prompts, each, strict=True)]

    def _complete(self, prompt: list[int], params: trimtab.SamplingParams) -> Any:
        assert params.temperature == 0.0
        text = self.answer(self.model.tokenizer.decode(prompt, skip_special_tokens=False))
        ids = self.model.tokenizer.encode(text, add_special_tokens=False)[: params.max_tokens]
        count = params.max_tokens if params.ignore_eos else len(ids)
        times = [self.slowness * (0.5 + 0.1 * i) for i in range(count)]
        return SimpleNamespace(
            text=self.model.tokenizer.decode(ids),
            metrics=SimpleNamespace(
                token_times=times,
                completion_tokens=count,
                kv_bytes_held=10 * (len(prompt) + count),
            ),
        )

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Any]:
        self.calls.append(pairs)
        judge = self.judge or (lambda _, tokens: ([-math.log(4096)] * len(tokens), [True] * len(tokens)))
        found = []
        for context, continuation in pairs:
            logprobs, greedy = judge(context, continuation)
            held = 10 * (len(context) + len(continuation))
            metrics = SimpleNamespace(kv_bytes_held=held, kv_bytes_host=0)
            found.append(SimpleNamespace(logprobs=logprobs, greedy=greedy, metrics=metrics))
        return found

    def reset_stats(self) -> None:
        self.calls.append("reset_stats")

    def stats(self) -> Any:
        return SimpleNamespace(kv_bytes_peak=777, kv_bytes_fetched=0, prefix_hit_tokens=self.hits)
