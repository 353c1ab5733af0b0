"""Texts that a model under training goes on with, by the engine that will serve it."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.errors import ConfigError
from trimtab.models.transformer import Model


def check_prompts(model: Model, prompts: Sequence[str]) -> None:
    """Raises ConfigError for a prompt that fills the model's context: before training, not in it."""
    assert model.tokenizer is not None, "data was tokenized by it"
    room = model.config.context_length
    for prompt in prompts:
        length = len(model.tokenizer.encode(prompt))
        if length >= room:
            raise ConfigError(
                f"the prompt {prompt[:40]!r} of the samples has {length} tokens and the model's context is "
                f"{room}; shorten it"
            )


def continue_prompts(model: Model, prompts: list[str], max_tokens: int) -> list[str]:
    """What `model` goes on with after each prompt, greedily."""
    from trimtab.decoding.sampling_params import SamplingParams
    from trimtab.engine.engine import Engine

    # Weights change between two rounds, so the kernels' packed copy of them would go stale: plain torch.
    engine = Engine(model, backend="torch", device=str(model.device), max_batch=len(prompts))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return [output.text for output in engine.generate(prompts, params)]
