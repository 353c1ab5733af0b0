"""From a model and a plan to kernels and a cache."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from trimtab.attachment import Attachments
from trimtab.errors import PlanError
from trimtab.kernels.build import build_in_background, is_built
from trimtab.kernels.reference import TorchKernels
from trimtab.kvcache.base import KVCache, KVShape
from trimtab.models import lora
from trimtab.models.sentences import sentence_ends
from trimtab.registry import KV_CACHES

if TYPE_CHECKING:
    from trimtab.kernels.native import Library, NativeModel
    from trimtab.models.transformer import Model
    from trimtab.plan import Plan

log = logging.getLogger("trimtab.engine")


def choose_backend(
    model: Model, backend: str, threads: int, wait: bool
) -> tuple[Library | TorchKernels, NativeModel | None]:
    """The kernels for the cache, and the native model unless torch runs the layers.

    `wait`: compile the kernels now if they are not there; otherwise compile for the next time and use torch.
    """
    if backend == "torch":
        return TorchKernels(), None
    from trimtab.kernels.native import Library, NativeModel, kind_of, unsupported, unsupported_layers

    reasons = unsupported(model.config, model.dtype, model.device)
    layer_reasons = unsupported_layers(model.config)
    if lora.on(model):
        # The C++ layers know nothing of adapters, which may be trained or switched off at any time.
        layer_reasons.append("it has adapters that are not folded into its weights")
    if backend == "native" and reasons + layer_reasons:
        raise PlanError([f"backend=native: {reason}" for reason in reasons + layer_reasons])
    # Only whole layers read weights; attention alone needs no other kernels for int8.
    int8 = model.weights == "int8" and not layer_reasons
    kind = kind_of(model.dtype, int8)
    if reasons:
        log.info("running on plain torch: %s", "; ".join(reasons))
        return TorchKernels(), None
    if backend == "auto" and not wait and not is_built(kind):
        build_in_background(kind)
        return TorchKernels(), None
    try:
        library = Library(model.dtype, threads, int8)
    except OSError as error:
        reason = f"{error}; install a C++ compiler (g++ or clang++)"
        if backend == "native":
            raise PlanError([f"backend=native: {reason}"]) from None
        log.info("running on plain torch: %s", reason)
        return TorchKernels(), None
    if layer_reasons:
        log.info("layers run on torch, attention on the C++ kernels: %s", "; ".join(layer_reasons))
        return library, None
    return library, NativeModel(library, model.config, model.state_dict())


def build_cache(model: Model, plan: Plan, kernels: Library | TorchKernels) -> KVCache:
    config = model.config
    method = KV_CACHES.get(plan.cache.name)
    shape = KVShape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        windows=tuple(config.sliding_windows),
        max_length=config.context_length,
        max_sequences=plan.max_batch,
        max_step_tokens=plan.max_step_tokens,
        dtype=model.dtype,
        device=model.device,
        rotary=model.rotary,
        kernels=kernels,
        attachments=Attachments(model),
        sentence_ends=partial(sentence_ends, model.tokenizer),
        chain=plan.cache.then,
    )
    return method.cls(shape, plan.cache.options, plan.kv_memory or default_memory(shape))


def default_memory(shape: KVShape) -> int:
    """Bytes for a full context of every sequence, but at most a quarter of what is free now."""
    wanted = shape.max_sequences * (shape.max_length + shape.max_step_tokens) * shape.token_bytes
    if shape.device.type == "cuda":
        import torch

        free = torch.cuda.mem_get_info(shape.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(wanted, max(free // 4, shape.token_bytes * 256))
