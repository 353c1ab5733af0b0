"""What a model costs, from its config alone, so that it can be told before any weight is loaded.

A multiply-add counts as two operations. Norms, rotary embedding, softmax and activations are left out:
together they are below one percent of a layer at any real width.
"""

from __future__ import annotations

from trimtab.models.config import ModelConfig


def _attention_matrices(config: ModelConfig) -> int:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.hidden_size * config.head_dim * heads


def _feed_forward_matrices(config: ModelConfig, layer: int, active_only: bool) -> int:
    if config.moe is None or not config.is_sparse(layer):
        return 3 * config.hidden_size * config.intermediate_size
    experts = config.moe.experts_per_token if active_only else config.moe.num_experts
    router = config.hidden_size * config.moe.num_experts
    return router + experts * 3 * config.hidden_size * config.moe.intermediate_size


def _body_matrices(config: ModelConfig, active_only: bool) -> int:
    return sum(
        _attention_matrices(config) + _feed_forward_matrices(config, layer, active_only)
        for layer in range(config.num_layers)
    )


def _vectors(config: ModelConfig) -> int:
    """Norm weights and biases."""
    hidden, d = config.hidden_size, config.head_dim
    layer = 2 * hidden
    layer += (config.num_heads + 2 * config.num_kv_heads) * d if config.qkv_bias else 0
    layer += hidden if config.o_bias else 0
    layer += 2 * d if config.qk_norm else 0
    dense = sum(not config.is_sparse(i) for i in range(config.num_layers))
    mlp = dense * (2 * config.intermediate_size + hidden) if config.mlp_bias else 0
    return config.num_layers * layer + mlp + hidden


def num_parameters(config: ModelConfig) -> int:
    """All parameters; a tied embedding counts once."""
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size + _body_matrices(config, False) + _vectors(config)


def matmul_parameters(config: ModelConfig, active_only: bool = False) -> int:
    """Parameters that rows are multiplied with: no embedding table, but the head, tied or not.

    `active_only` counts of each expert layer only the experts that one token visits.
    """
    return _body_matrices(config, active_only) + config.vocab_size * config.hidden_size


def _body_rows(config: ModelConfig, active_only: bool) -> int:
    """Rows of the layers' matrices, routers left out."""
    rows = 0
    for layer in range(config.num_layers):
        rows += (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + config.hidden_size
        if config.moe is None or not config.is_sparse(layer):
            rows += 2 * config.intermediate_size + config.hidden_size
        else:
            experts = config.moe.experts_per_token if active_only else config.moe.num_experts
            rows += experts * (2 * config.moe.intermediate_size + config.hidden_size)
    return rows


def _routers(config: ModelConfig) -> int:
    """Parameters of all routers, which no method of storing weights touches."""
    if config.moe is None:
        return 0
    sparse = sum(config.is_sparse(layer) for layer in range(config.num_layers))
    return sparse * config.hidden_size * config.moe.num_experts


def matmul_bytes(config: ModelConfig, itemsize: int, *, int8: bool = False, active_only: bool = False) -> int:
    """Bytes of the `matmul_parameters`: `itemsize` each, or with `int8` one each and four a row."""
    if not int8:
        return matmul_parameters(config, active_only) * itemsize
    rows = _body_rows(config, active_only) + config.vocab_size
    return matmul_parameters(config, active_only) + 4 * rows + _routers(config) * (itemsize - 1)


def weight_bytes(config: ModelConfig, itemsize: int, *, int8: bool = False) -> int:
    """Bytes of all parameters; a tied embedding counts once."""
    if not int8:
        return num_parameters(config) * itemsize
    table = 0 if config.tie_word_embeddings else config.vocab_size * (config.hidden_size + 4)
    return matmul_bytes(config, itemsize, int8=True) + table + _vectors(config) * itemsize


def kv_bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Bytes of keys and values for a token over all layers, `itemsize` bytes an element."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def decode_flops(config: ModelConfig, context: int) -> int:
    """Operations for one token that attends to `context` tokens, itself included."""
    seen = sum(min(context, window or context) for window in config.sliding_windows)
    return 2 * matmul_parameters(config, active_only=True) + 4 * config.num_heads * config.head_dim * seen


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Operations for a prompt of `tokens`, causal attention counted as such, logits for the last only."""
    seen = 0
    for window in config.sliding_windows:
        full = min(tokens, window or tokens)
        seen += full * (full + 1) // 2 + (tokens - full) * full
    body = 2 * _body_matrices(config, active_only=True) * tokens
    head = 2 * config.vocab_size * config.hidden_size
    return body + head + 4 * config.num_heads * config.head_dim * seen
