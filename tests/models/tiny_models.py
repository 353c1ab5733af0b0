"""Tiny random `transformers` models, one for each switch of each family, and a slow cached reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab.models.rotary import rotate
from trimtab.models.transformer import Model

_BASE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.25,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@dataclass(frozen=True)
class Tiny:
    """A family (the prefix of the `transformers` class names), config changes and a text length."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    length: int = 48


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **settings}}


CASES: dict[str, Tiny] = {
    "llama": Tiny("Llama"),
    "llama-mqa-tied": Tiny("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama-mha-biases": Tiny("Llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
    "llama-wide-heads": Tiny("Llama", dict(head_dim=24)),
    "llama-big-theta": Tiny("Llama", _rope(rope_type="default", rope_theta=500_000.0)),
    "llama-linear": Tiny("Llama", _rope(rope_type="linear", factor=4.0), length=160),
    "llama-dynamic": Tiny("Llama", _rope(rope_type="dynamic", factor=2.0), length=160),
    "llama-dynamic-short": Tiny("Llama", _rope(rope_type="dynamic", factor=4.0), length=20),
    "llama-yarn": Tiny(
        "Llama",
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
        | dict(max_position_embeddings=256),
        length=250,
    ),
    "llama-yarn-mscale": Tiny(
        "Llama",
        _rope(
            rope_type="yarn",
            factor=8.0,
            original_max_position_embeddings=32,
            mscale=1.2,
            mscale_all_dim=0.7,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        )
        | dict(max_position_embeddings=256),
        length=128,
    ),
    "llama-yarn-attention-factor": Tiny(
        "Llama",
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3)
        | dict(max_position_embeddings=256),
        length=100,
    ),
    "llama3": Tiny(
        "Llama",
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
        | dict(max_position_embeddings=512, num_hidden_layers=2),
        length=512,
    ),
    "mistral": Tiny("Mistral", dict(sliding_window=None)),
    "mistral-window": Tiny("Mistral", dict(sliding_window=9)),
    "mistral-wide-heads": Tiny("Mistral", dict(sliding_window=70, head_dim=12)),
    "qwen2": Tiny("Qwen2"),
    "qwen2-tied": Tiny("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-window": Tiny("Qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen2-layer-types": Tiny(
        "Qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "qwen2-yarn": Tiny(
        "Qwen2", _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), length=128
    ),
    "qwen3": Tiny("Qwen3", dict(head_dim=16)),
    "qwen3-bias": Tiny("Qwen3", dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "qwen3-window": Tiny(
        "Qwen3", dict(head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=2)
    ),
    "mixtral": Tiny("Mixtral", dict(num_local_experts=5, num_experts_per_tok=2)),
    "mixtral-window-top1": Tiny(
        "Mixtral", dict(num_local_experts=3, num_experts_per_tok=1, sliding_window=8, head_dim=12)
    ),
    "qwen3moe": Tiny(
        "Qwen3Moe",
        dict(
            num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True, head_dim=16
        ),
    ),
    "qwen3moe-mixed-layers": Tiny(
        "Qwen3Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            num_hidden_layers=4,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            attention_bias=True,
        ),
    ),
    "qwen3moe-window": Tiny(
        "Qwen3Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            use_sliding_window=True,
            sliding_window=6,
        ),
    ),
}


def make(case: Tiny, folder: Path, **save_options: Any) -> Path:
    """Write the case's model to `folder` with `save_pretrained`; norms and biases random too."""
    torch.manual_seed(sum(map(ord, case.family + repr(sorted(case.config.items(), key=str)))))
    config = getattr(transformers, f"{case.family}Config")(**(_BASE | case.config))
    model = getattr(transformers, f"{case.family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(folder, **save_options)
    return folder


def oracle(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The `transformers` model of a folder; fresh, as its dynamic rope scaling remembers longer calls."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def texts(model: Model, count: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (count, length), generator=generator)


class CachedAttend:
    """Attention over everything seen so far, one text, as plainly as can be: the cached reference."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.positions = torch.empty(0, dtype=torch.long)
        self.length = 0

    def feed(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Hidden states of the next tokens; `length` is the text's length for dynamic scaling."""
        start = len(self.positions)
        new = torch.arange(start, start + len(tokens))
        self.positions, self.length = torch.cat((self.positions, new)), length
        return self.model.run(tokens, new, self)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        new = self.positions[-len(q) :]
        cos, sin = self.model.rotary.cos_sin(new, self.length)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if layer in self.keys:
            k, v = torch.cat((self.keys[layer], k)), torch.cat((self.values[layer], v))
        self.keys[layer], self.values[layer] = k, v
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(group, 1)) / math.sqrt(q.shape[-1])
        distance = new[:, None] - self.positions[None, :]
        window = self.model.config.sliding_windows[layer] or len(self.positions)
        scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
        return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v.repeat_interleave(group, 1))


def greedy(model: Model, prompt: list[int], new_tokens: int, chunk: int) -> list[int]:
    """Greedy continuation through `Model.run`, the prompt fed in pieces of `chunk` tokens."""
    attend = CachedAttend(model)
    tokens = torch.tensor(prompt)
    for piece in tokens.split(chunk):
        hidden = attend.feed(piece, length=len(prompt))
    out: list[int] = []
    while True:
        out.append(int(model.logits(hidden[-1]).argmax()))
        if len(out) == new_tokens:
            return out
        hidden = attend.feed(torch.tensor(out[-1:]), length=len(prompt) + len(out))
