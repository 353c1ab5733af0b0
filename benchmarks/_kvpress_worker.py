"""kvpress behind a pipe: one JSON object a line in, one a line out. Runs in kvpress's own environment.

    python _kvpress_worker.py MODEL_FOLDER DTYPE THREADS

A request has `ids` (the prompt), `press` (a name of `_press`, or null), `ratio` (the share that is removed)
and one of
    "question": ids, "tokens": n   compress after `ids`, then feed the question, then decode n greedy tokens
                                   (up to an end token unless `ignore_end`)
    "score": ids                   compress after `ids`, then score each of these, one by one
The answer has `tokens` or `logprobs`, `bytes` (of the tensors that the cache holds at the end), and the
seconds to the first token and per token after it. Only torch, transformers and kvpress are imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
import time
from typing import Any

import torch


def main() -> None:
    # Whatever a library prints must not get between the answers.
    answers = sys.stdout
    sys.stdout = sys.stderr
    folder, dtype, threads = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    worker = Worker(folder, dtype)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    packages = ("kvpress", "transformers", "torch", "optimum-quanto")
    answer({"versions": {name: _version(name) for name in packages}})
    for line in sys.stdin:
        try:
            answer(worker.serve(json.loads(line)))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _press(name: str, ratio: float, options: dict[str, Any]) -> Any:
    import kvpress

    snap = {"window_size": 32} | options
    return {
        "SnapKV": lambda: kvpress.SnapKVPress(ratio, **snap),
        "StreamingLLM": lambda: kvpress.StreamingLLMPress(ratio, **options),
        "ObservedAttention": lambda: kvpress.ObservedAttentionPress(ratio, **options),
        "ExpectedAttention": lambda: kvpress.ExpectedAttentionPress(ratio, **options),
        "AdaKV(SnapKV)": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, **snap)),
        "AdaKV(ExpectedAttention)": lambda: kvpress.AdaKVPress(
            kvpress.ExpectedAttentionPress(ratio, **options)
        ),
    }[name]()


class Worker:
    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        import kvpress  # noqa: F401  # it patches the attention functions of transformers
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # Observed attention needs the probabilities, which only the eager form returns.
        self.models = {
            kind: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=kind).eval()
            for kind in ("sdpa", "eager")
        }

    @torch.inference_mode()
    def serve(self, request: dict[str, Any]) -> dict[str, Any]:
        from transformers import DynamicCache, QuantizedCache

        name, options = request.get("press"), request.get("options", {})
        model = self.models["eager" if name == "ObservedAttention" else "sdpa"]
        quantized = name == "QuantizedCache"
        if quantized:
            cache = QuantizedCache(backend="quanto", config=model.config, **options)
        else:
            cache = DynamicCache()
        ids = torch.tensor([request["ids"]])
        press = None if name is None or quantized else _press(name, request["ratio"], options)
        start = time.perf_counter()
        with contextlib.nullcontext() if press is None else press(model):
            # Without the head, as kvpress's own pipeline does; the last row's logits are formed below.
            out = model.model(input_ids=ids, past_key_values=cache)
        logits = model.lm_head(out.last_hidden_state[0, -1])
        position = ids.shape[1]
        if "score" in request:
            found = {"logprobs": self._score(model, cache, logits, position, request["score"])}
        else:
            found = self._decode(model, cache, logits, position, request, start)
        for layer in model.model.layers:  # AdaKV leaves its mask on the modules
            layer.self_attn.masked_key_indices = None
        return found | {"bytes": _bytes(cache)}

    @staticmethod
    def _step(model: Any, cache: Any, tokens: list[int], position: int) -> torch.Tensor:
        """The logits after `tokens`, the first of which stands at `position` of the text."""
        positions = torch.arange(position, position + len(tokens))[None]
        ids = torch.tensor([tokens])
        out = model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=1)
        return out.logits[0, -1]

    def _score(
        self, model: Any, cache: Any, logits: torch.Tensor, position: int, tokens: list[int]
    ) -> list[float]:
        found = []
        for i, token in enumerate(tokens):
            found.append(float(logits.float().log_softmax(-1)[token]))
            if i + 1 < len(tokens):
                logits = self._step(model, cache, [token], position + i)
        return found

    def _decode(
        self,
        model: Any,
        cache: Any,
        logits: torch.Tensor,
        position: int,
        request: dict[str, Any],
        start: float,
    ) -> dict[str, Any]:
        if request["question"]:
            logits = self._step(model, cache, request["question"], position)
            position += len(request["question"])
        ends = model.generation_config.eos_token_id
        ends = set() if request.get("ignore_end") else {ends} if isinstance(ends, int) else set(ends)
        tokens = [int(logits.argmax())]
        times = [time.perf_counter()]
        while len(tokens) < request["tokens"] and tokens[-1] not in ends:
            logits = self._step(model, cache, [tokens[-1]], position)
            position += 1
            tokens.append(int(logits.argmax()))
            times.append(time.perf_counter())
        token_s = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        return {"tokens": tokens, "ttft_s": times[0] - start, "token_s": token_s}


def _bytes(cache: Any) -> int:
    """Bytes of all tensors that the cache's layers hold, packed ones as they lie in memory."""
    return sum(_tensor_bytes(value) for layer in cache.layers for value in vars(layer).values())


def _tensor_bytes(value: Any) -> int:
    inner = [x for x in getattr(value, "__dict__", {}).values() if isinstance(x, torch.Tensor)]
    if inner:  # a quantized tensor: codes, scales and shifts
        return sum(map(_tensor_bytes, inner))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


if __name__ == "__main__":
    main()
