"""llama.cpp as a contender: a model as GGUF, and the leanest decode loop its Python binding allows."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from trimtab.models.transformer import Model

# torch type: (GGUF tensor type, GGUF file type, ggml number of the cache's type)
_TYPES = {
    torch.float32: ("F32", "ALL_F32", 0),
    torch.float16: ("F16", "MOSTLY_F16", 1),
    torch.bfloat16: ("BF16", "MOSTLY_BF16", 30),
}


class Mismatch(Exception):
    """llama.cpp computes something else than we do, so its speed would mean nothing."""


def export(model: Model, path: Path) -> None:
    """Write a Llama-layout model to `path` in its own type, without a vocabulary: tokens go in as ids."""
    import gguf

    c = model.config
    if c.qk_norm or c.qkv_bias or c.o_bias or c.mlp_bias or c.moe is not None or c.rope.kind != "default":
        raise Mismatch("only plain Llama models are exported")
    tensor_type, file_type, _ = _TYPES[model.dtype]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_layers)
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name.endswith("q_proj.weight"):
            weight = interleaved(weight, c.num_heads)
        elif name.endswith("k_proj.weight"):
            weight = interleaved(weight, c.num_kv_heads)
        target = names.get_name(name, try_suffixes=(".weight",))
        if target is None:
            raise Mismatch(f"GGUF has no name for {name}")
        if weight.dim() == 1:
            writer.add_tensor(target, weight.float().numpy())
        else:
            raw = weight.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType[tensor_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, D] of a projection with the two halves of each head interleaved: GGUF's Llama rotates
    neighbours (2i, 2i + 1) where Hugging Face checkpoints rotate (i, i + d / 2)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class LlamaCpp:
    """Greedy decoding through `llama_decode` with batches of one and the argmax of the logits in numpy.

    The cache has the weights' type. Raises Mismatch if the file does not load.
    """

    def __init__(self, path: Path, dtype: torch.dtype, threads: int, context: int) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(_silence)  # must outlive every call
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise Mismatch("llama.cpp does not load the exported file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = _TYPES[dtype][2]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise Mismatch(f"llama.cpp makes no context with a cache of {dtype}")
        self.vocab: int = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """`count` greedy tokens after `prompt`, and the time at which each was known."""
        lib, context = self.lib, self.context
        decode, address_of = lib.llama_decode, lib.llama_get_logits_ith
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        tokens, times = [], []
        one = (lib.llama_token * 1)()
        single = lib.llama_batch_get_one(one, 1)
        ids = (lib.llama_token * len(prompt))(*prompt)  # a batch only points at its tokens
        batch = lib.llama_batch_get_one(ids, len(prompt))
        views: dict[int, np.ndarray] = {}
        for _ in range(count):
            if decode(context, batch) != 0:
                raise Mismatch("llama_decode failed")
            pointer = address_of(context, -1)
            at = ctypes.addressof(pointer.contents)
            logits = views.get(at)
            if logits is None:
                logits = views[at] = np.ctypeslib.as_array(pointer, (self.vocab,))
            one[0] = token = int(logits.argmax())
            tokens.append(token)
            times.append(time.perf_counter())
            batch = single
        return tokens, times

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [T, V] after each token, fed one by one as decoding feeds them."""
        lib = self.lib
        lib.llama_memory_clear(lib.llama_get_memory(self.context), False)
        one = (lib.llama_token * 1)()
        batch = lib.llama_batch_get_one(one, 1)
        rows = []
        for token in tokens:
            one[0] = token
            if lib.llama_decode(self.context, batch) != 0:
                raise Mismatch("llama_decode failed")
            rows.append(
                np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, -1), (self.vocab,)).copy()
            )
        return np.stack(rows)


@torch.inference_mode()
def agreement(model: Model, llama: LlamaCpp, tokens: list[int]) -> dict[str, float]:
    """How near llama.cpp's logits are to ours along `tokens`, teacher-forced.

    `error` is the root mean square difference over the root mean square logit; `argmax` the share of
    positions with the same likeliest token. Raises Mismatch where they do not describe the same model.
    """
    ours = model(torch.tensor([tokens]))[0].float().numpy()
    theirs = llama.logits(tokens)
    error = float(np.sqrt(((ours - theirs) ** 2).mean() / (ours**2).mean()))
    same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    allowed = 1e-3 if model.dtype == torch.float32 else 0.1
    if error > allowed:
        raise Mismatch(f"its logits differ from ours by {error:.1%}")
    return {"error": error, "argmax": same}


def _silence(level: int, text: bytes, data: Any) -> None:
    """llama.cpp writes its loading report to stderr unless told not to."""
