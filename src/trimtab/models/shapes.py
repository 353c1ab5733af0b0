"""Models of a given shape with random weights: for benchmarks and tests, no checkpoint needed."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import ConfigError, did_you_mean
from trimtab.models.checkpoint import parse_device, parse_dtype
from trimtab.models.config import ModelConfig, config_from_dict
from trimtab.models.transformer import Model

# name: hidden, intermediate, layers, heads, key/value heads, vocabulary, tied, rope base, context
_SHAPES: dict[str, tuple[int, int, int, int, int, int, bool, float, int]] = {
    "125m": (768, 2048, 12, 12, 12, 50304, True, 10_000.0, 4096),
    "500m": (1280, 3584, 24, 20, 5, 50304, True, 10_000.0, 4096),
    "1b": (2048, 8192, 16, 32, 8, 128256, True, 500_000.0, 131_072),
    "8b": (4096, 14336, 32, 32, 8, 128256, False, 500_000.0, 131_072),
}

# Drawing billions of random numbers takes minutes; copying from a few millions takes seconds. The pool's
# size is a prime, so no two rows of a matrix begin at the same place in it.
_POOL = 4_194_301


def shape(name: str, **changes: Any) -> ModelConfig:
    """The config of a named Llama shape; `changes` are keys of its `config.json`, e.g. `vocab_size=512`."""
    if name not in _SHAPES:
        raise ConfigError(f"unknown model shape {name!r}.{did_you_mean(name, _SHAPES)}")
    hidden, intermediate, layers, heads, kv_heads, vocab, tied, theta, context = _SHAPES[name]
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config_from_dict(raw | changes, where=f"the shape {name!r}")


def random_model(
    config: ModelConfig,
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Model:
    """A model of this shape with random weights, the same for the same seed, dtype and kind of device.

    Matrices are uniform with variance 1 / inputs, so activations keep their size through the layers;
    norms are one and biases zero. `tokenizer` and `path` are None.
    """
    wanted, where = parse_dtype(dtype) or torch.float32, parse_device(device)
    with torch.device("meta"):
        model = Model(config)
    model.to(wanted).to_empty(device=where)
    generator = torch.Generator(where).manual_seed(seed)
    pool = torch.empty(_POOL, device=where).uniform_(-1, 1, generator=generator).to(wanted)
    starts = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                start = int(torch.randint(_POOL, (), generator=starts))
                _fill(parameter, pool, start, (3 / parameter.shape[1]) ** 0.5)
            else:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
    return model.eval()


def _fill(matrix: torch.Tensor, pool: torch.Tensor, start: int, bound: float) -> None:
    """Numbers of the pool from `start` on, around and around, times `bound`."""
    flat = matrix.view(-1)
    done = 0
    while done < flat.numel():
        part = pool[start : start + flat.numel() - done]
        torch.mul(part, bound, out=flat[done : done + part.numel()])
        done, start = done + part.numel(), 0
