"""One decoder-only Transformer for all supported families, in plain PyTorch.

Parameter names and shapes are those of the Hugging Face checkpoint; nothing is permuted or fused. There
is one way through the layers, `Model.run`, over flattened rows; what attends to what is the business of
the `attend` function that it is given. The plain forward for training and oracles gives it a causal one.

Shape letters: B texts, T tokens of a text, N rows (tokens of any texts), D hidden size, H query heads,
G key/value heads, d head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from trimtab.kernels.training.elementwise import rms_norm, swiglu
from trimtab.models import costs
from trimtab.models.causal import CausalAttend
from trimtab.models.config import ModelConfig
from trimtab.models.fingerprint import Fingerprint
from trimtab.models.moe import SparseMLP
from trimtab.models.rotary import Rotary

if TYPE_CHECKING:
    from trimtab.models.tokenizer import Tokenizer

# attend(layer, q[N, H, d], k[N, G, d], v[N, G, d]) -> [N, H, d]; q and k come before rotary embedding.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RMSNorm(nn.Module):
    """Scale by the root mean square over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return rms_norm(x, self.weight, self.eps)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Projections into heads and back, with bias and QK-norm where the family has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(hidden, config.num_heads * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * d, hidden, bias=config.o_bias)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`x[N, D]` to q `[N, H, d]`, k and v `[N, G, d]`, after QK-norm and before rotary embedding."""
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)
        k = self.k_proj(x).unflatten(-1, heads)
        v = self.v_proj(x).unflatten(-1, heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class MLP(nn.Module):
    """The gated feed-forward part: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
            return self.down_proj(swiglu(gate, up))
        return self.down_proj(nn.functional.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on the normed residual stream and added to it."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = Attention(config)
        sparse = config.moe if config.is_sparse(index) else None
        # The checkpoint's name for the feed-forward part: `mlp`, or the family's own for experts.
        self._feed_forward = sparse.block_name if sparse else "mlp"
        self.add_module(self._feed_forward, SparseMLP(config.hidden_size, sparse) if sparse else MLP(config))
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def feed_forward(self) -> nn.Module:
        """The `MLP` or `SparseMLP` of this layer, whatever the checkpoint calls it."""
        return self.get_submodule(self._feed_forward)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """`x[N, D]` to `[N, D]`."""
        q, k, v = self.self_attn.project(self.input_layernorm(x))
        x = x + self.self_attn.o_proj(attend(self.index, q, k, v).flatten(-2))
        return x + self.feed_forward(self.post_attention_layernorm(x))


class Embedding(nn.Embedding):
    """An embedding that draws no starting values on the meta device.

    There are none to draw, but torch would import its compiler for it, which takes a second.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head of a model that ties it to the embedding: `[..., D]` to `[..., V]`."""
        return nn.functional.linear(hidden, self.weight)


class Decoder(nn.Module):
    """Embedding, layers and final norm: what a checkpoint keeps under `model.`"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(nn.Module):
    """A language model. Make one with `trimtab.load` or `random_model`.

    Attributes:
        config: a frozen `ModelConfig`.
        rotary: `Rotary`, which turns positions into cosine and sine tables.
        tokenizer: the checkpoint's `Tokenizer`; None for a model made without a checkpoint.
        path: the folder it was loaded from, or None.
        adapter: the folder of the adapter that was merged into it when it was loaded, or None.
        weights: the method of `compression/` by which its matrices are stored; `plain`: as parameters.
        lm_head: the output head, or None where the embedding table is used (`output_weight` is either).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config.rope, config.head_dim)
        self.tokenizer: Tokenizer | None = None
        self.path: Path | None = None
        self.adapter: str | None = None
        self.weights = "plain"
        self._fingerprint = Fingerprint()

    @property
    def output_weight(self) -> torch.Tensor:
        """The output head `[V, D]`."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters and of all results."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.embed_tokens.weight.device

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Plain causal forward: token ids `[B, T]` to logits `[B, T, V]` in the model's dtype.

        `attention_mask[B, T]` is 1 for tokens and 0 for padding, which may stand on either side; logits at
        padding are finite and without meaning. Dynamic rope scaling sees a text of length T.
        """
        attend = CausalAttend(self.config, self.rotary, input_ids, attention_mask)
        hidden = self.run(input_ids.flatten(), attend.positions, attend)
        return self.logits(hidden).unflatten(0, input_ids.shape)

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        residuals: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The serving forward over flattened rows: `tokens[N]`, `positions[N]` to hidden `[N, D]`.

        Each layer calls `attend(layer, q, k, v)` with keys and queries before rotary embedding; storing
        the past, rotating by `positions` and attending are its business. The result is after the final
        norm. For each layer that is a key of `residuals`, the residual stream `[N, D]` that enters it is
        put there.
        """
        if tokens.shape != positions.shape:
            raise AssertionError(f"{tuple(tokens.shape)} tokens but {tuple(positions.shape)} positions")
        x = self.model.embed_tokens(tokens)
        for number, layer in enumerate(self.model.layers):
            if residuals is not None and number in residuals:
                residuals[number] = x
            x = layer(x, attend)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head: hidden `[..., D]` to logits `[..., V]`."""
        return self.model.embed_tokens.logits(hidden) if self.lm_head is None else self.lm_head(hidden)

    def fingerprint(self) -> str:
        """A sha256 that names this model's function; see `models/fingerprint.py` for what it covers."""
        return self._fingerprint.of(self)

    def num_parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        return costs.num_parameters(self.config)

    def matmul_parameters(self, active_only: bool = False) -> int:
        """Parameters that rows are multiplied with: no embedding table, but the head, tied or not.

        `active_only` counts of each expert layer only the experts that one token visits.
        """
        return costs.matmul_parameters(self.config, active_only)

    def weight_bytes(self) -> int:
        """Bytes that the weights occupy, factors of quantized ones included."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def matmul_bytes(self, active_only: bool = False) -> int:
        """Bytes of the weights that rows are multiplied with; `active_only` as in `matmul_parameters`."""
        int8 = self.weights == "int8"
        return costs.matmul_bytes(self.config, self.dtype.itemsize, int8=int8, active_only=active_only)

    def kv_bytes_per_token(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of keys and values that an uncompressed cache keeps for a token; `dtype` of the cache."""
        return costs.kv_bytes_per_token(self.config, (dtype or self.dtype).itemsize)

    def decode_flops(self, context: int) -> int:
        """Floating-point operations for one token that attends to `context` tokens, itself included."""
        return costs.decode_flops(self.config, context)

    def prefill_flops(self, tokens: int) -> int:
        """Floating-point operations for a prompt of `tokens`, logits for its last token only."""
        return costs.prefill_flops(self.config, tokens)
