"""trimtab, transformers and llama.cpp behind one call each: prompts in, a timed sample out."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import Sample, missing
from _llama import LlamaCpp, Mismatch, agreement, export

from trimtab import Engine, Model, SamplingParams
from trimtab.models.save import save

if TYPE_CHECKING:
    from trimtab.engine.request import RequestOutput


def greedy(tokens: int) -> SamplingParams:
    """Exactly `tokens` greedy tokens, whatever they are."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def run_ours(engine: Engine, prompts: Sequence[list[int]], counts: Sequence[int]) -> Sample:
    """All prompts at once, `counts[i]` tokens for prompt i, end to end through `Engine.generate`."""
    start = time.perf_counter()
    outs = engine.generate(list(prompts), [greedy(n) for n in counts])
    seconds = time.perf_counter() - start
    assert [len(out.token_ids) for out in outs] == list(counts)
    return Sample(sum(counts), seconds, _time_per_token(outs) if len(outs) == 1 else None)


def _time_per_token(outs: Sequence[RequestOutput]) -> float | None:
    times = outs[0].metrics.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


class Transformers:
    """`generate` of transformers with the same weights, loaded from a folder written by `trimtab` itself."""

    def __init__(self, model: Model) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as scratch:
            folder = save(model, Path(scratch) / "model")
            # The files go away with the folder, so the weights must not stay mapped from them.
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
            for parameter in loaded.parameters():
                parameter.data = parameter.data.clone()
        self.model = loaded.to(model.device).eval()
        self.device = model.device
        generation = self.model.generation_config
        generation.eos_token_id, generation.pad_token_id = None, 0  # nothing ends early, as with ignore_eos

    def run(self, prompts: Sequence[list[int]], counts: Sequence[int], cache: str = "dynamic") -> Sample:
        """One left-padded batch; it runs until its longest text is done, but only `counts` are useful.

        `cache`: `dynamic`, its default, or `static`.
        """
        start = time.perf_counter()
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=max(counts), do_sample=False, **options
            )
        assert out.shape[1] == width + max(counts)
        self.last: list[list[int]] = out[:, width:].tolist()
        return Sample(sum(counts), time.perf_counter() - start)


@contextlib.contextmanager
def llama_cpp(
    model: Model, prompt: list[int], tokens: int, threads: int
) -> Iterator[tuple[Callable[[], Sample], dict[str, float]] | str]:
    """llama.cpp decoding the same weights, and how well its numbers agree; or why it is left out."""
    why = missing("llama_cpp", "gguf")
    if why is None and model.device.type != "cpu":
        why = "CPU only here"
    if why is not None:
        yield why
        return
    with tempfile.TemporaryDirectory() as scratch:
        llama = None
        try:
            path = Path(scratch) / "model.gguf"
            export(model, path)
            llama = LlamaCpp(path, model.dtype, threads, len(prompt) + tokens)
            agreed = agreement(model, llama, prompt + llama.generate(prompt, min(tokens, 32))[0])
        except (Mismatch, OSError) as error:
            if llama is not None:
                llama.close()
            yield f"left out: {error}"
            return

        def run() -> Sample:
            start = time.perf_counter()
            _, times = llama.generate(prompt, tokens)
            return Sample(tokens, times[-1] - start, (times[-1] - times[0]) / max(1, tokens - 1))

        try:
            yield run, agreed
        finally:
            llama.close()
