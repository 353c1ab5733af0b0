"""A run that takes milliseconds: a tiny model, and data made from numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.models.config import config_from_dict
from trimtab.models.transformer import Model
from trimtab.training.data.mixture import Mixture
from trimtab.training.data.segments import Segment, all_trained
from trimtab.training.data.sources.base import Source
from trimtab.training.loop import Trainer
from trimtab.training.objectives.lm import LanguageModelling
from trimtab.training.recipe import Recipe, recipe_from_dict
from trimtab.training.watching.metrics import read_lines

VOCAB = 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Steps(Source):
    """Segment i of a seed: 5 to 20 tokens that count upwards from a random one."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.cursor = seed, 0

    def next(self) -> Segment:
        rng = np.random.default_rng((self.seed, self.cursor))
        self.cursor += 1
        return all_trained((rng.integers(VOCAB) + np.arange(rng.integers(5, 20))) % VOCAB)

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


def tiny_recipe(output: Path | str, **changes: Any) -> Recipe:
    """10 steps of about 110 tokens, two micro-batches each, no checkpoint but the last."""
    settings: dict[str, Any] = {
        "output": str(output),
        "model": {"config": CONFIG},
        "mixture": [{"kind": "counting", "weight": 3}, {"kind": "counting", "weight": 1}],
        "tokens": 1000,
        "batch_tokens": 100,
        "micro_batch_tokens": 64,
        "optimizer": {"lr": 0.01},
        "checkpoint_minutes": 100,
        "device": "cpu",
        "log_seconds": 1000,
        "save_dtype": "float32",
    }
    return recipe_from_dict(settings | changes)


def tiny_model(seed: int = 0) -> Model:
    model = Model(config_from_dict(CONFIG)).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


def tiny_trainer(output: Path | str, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    source = Mixture([Steps(0), Steps(1)], [3, 1])
    trainer = Trainer(tiny_recipe(output, **changes), tiny_model(), source, LanguageModelling())
    other = Steps(9)
    trainer.validation = [other.next() for _ in range(8)]
    return trainer


def losses(output: Path) -> list[tuple[int, float, float, float]]:
    """What is the same bit for bit however often a run was interrupted: step, loss, gradient norm, rate."""
    keys = ("step", "loss", "grad_norm", "lr")
    return [tuple(record[k] for k in keys) for record in read_lines(output / "metrics.jsonl")]
