"""Texts that a model under training goes on with, by the engine that will serve it."""

from __future__ import annotations

from trimtab.models.transformer import Model


def continue_prompts(model: Model, prompts: list[str], max_tokens: int) -> list[str]:
    """What `model` goes on with after each prompt, greedily."""
    from trimtab.decoding.sampling_params import SamplingParams
    from trimtab.engine.engine import Engine

    # Weights change between two rounds, so the kernels' packed copy of them would go stale: plain torch.
    engine = Engine(model, backend="torch", device=str(model.device), max_batch=len(prompts))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return [output.text for output in engine.generate(prompts, params)]
