"""The output head and its cross entropy in one: logits exist for a few rows at a time only.

The loss is a sum, so that its gradients are known up to one factor as soon as a row's logits are: they are
formed in the forward pass, chunk by chunk, and the backward pass only scales them. The memory for `[N, V]`
logits is never needed (as in Cut Cross-Entropy, arXiv 2411.09009, and the Liger kernels, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels.training.library import native

CHUNK_BYTES = 1 << 22  # float32 logits of one chunk: they are to stay in the cache
LEAST_ROWS = 128  # below this a matrix product no longer pays


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of `hidden @ weight.T` against `targets`: (sum, nll of each row).

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`, the output head.
        targets: int64 `[N]`; a row with a negative target is left out.
        weights: float `[N]`, by which each row counts; a row of weight 0 is left out. No gradient.
        z_loss: adds `z_loss * logsumexp(logits)**2` to each row's loss before it is weighted
            (PaLM, arXiv 2204.02311), which keeps logits from drifting.

    Returns:
        The float32 sum over rows of `weights * (nll + z_loss * logsumexp**2)`, with gradients for `hidden`
        and `weight`; and float32 `[N]` negative log-likelihoods in nats, 0 where left out, without gradient.
    """
    recorded = torch.is_grad_enabled()  # else no gradient is formed
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, z_loss, recorded)  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_loss: float,
        recorded: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [recorded and needed for needed in ctx.needs_input_grad[:2]]
        with torch.autocast(hidden.device.type, enabled=False):
            loss, nll, *gradients = _all_chunks(hidden, weight, targets, weights, z_loss, *wanted)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = (x if x is None else x * factor.to(x.dtype) for x in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None


def _all_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss, nll and the gradients that are wanted, None for the others."""
    vocab = weight.shape[0]
    if targets.numel() and int(targets.max()) >= vocab:
        raise AssertionError(f"target {int(targets.max())} is not below the vocabulary size, {vocab}")
    kept = ((targets >= 0) & (weights != 0)).nonzero().squeeze(1)
    everything = kept.numel() == targets.numel()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.contiguous() if everything else hidden[kept]
    targets, scales = targets[kept], weights[kept].to(wide)
    head = weight.to(hidden.dtype)
    nll, lse = torch.zeros(2, kept.numel(), dtype=wide, device=hidden.device)
    d_rows = torch.empty_like(rows) if want_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
    step = max(LEAST_ROWS, CHUNK_BYTES // (4 * vocab))
    buffer = rows.new_empty(min(step, kept.numel()), vocab)
    for begin in range(0, kept.numel(), step):
        chunk = slice(begin, begin + step)
        logits = buffer[: len(rows[chunk])]
        torch.mm(rows[chunk], head.T, out=logits)
        d_logits = _softmax_loss(logits, targets[chunk], scales[chunk], z_loss, nll[chunk], lse[chunk])
        if d_rows is not None:
            torch.mm(d_logits, head, out=d_rows[chunk])
        if d_weight is not None:
            _add_product_(d_weight, d_logits, rows[chunk])
    loss = (scales * (nll + z_loss * lse.square())).sum()
    all_nll = torch.zeros(weights.shape, dtype=wide, device=hidden.device).index_copy_(0, kept, nll)
    if d_rows is not None and not everything:
        d_rows = torch.zeros_like(hidden).index_copy_(0, kept, d_rows)
    return loss, all_nll, d_rows, None if d_weight is None else d_weight.to(weight.dtype)


def _softmax_loss(
    logits: Tensor, targets: Tensor, scales: Tensor, z_loss: float, nll: Tensor, lse: Tensor
) -> Tensor:
    """Fill `nll` and `lse` `[n]`; the gradient of the loss for `logits[n, V]`, which are overwritten."""
    lib = native(logits, scales)
    if lib is not None:
        addresses = [x.data_ptr() for x in (targets, scales, nll, lse)]
        lib.tt_softmax_loss(
            logits.data_ptr(), *logits.shape, *addresses[:2], z_loss, *addresses[2:], torch.get_num_threads()
        )
        return logits
    x = logits.to(nll.dtype)
    z = x.logsumexp(-1)
    at = targets.unsqueeze(1)
    nll.copy_(z - x.gather(1, at).squeeze(1))
    lse.copy_(z)
    x.sub_(z.unsqueeze(1)).exp_().mul_((1 + 2 * z_loss * z).unsqueeze(1))
    x.scatter_add_(1, at, torch.full_like(at, -1.0, dtype=x.dtype)).mul_(scales.unsqueeze(1))
    return x.to(logits.dtype)


def _add_product_(total: Tensor, d_logits: Tensor, rows: Tensor) -> None:
    if total.dtype == rows.dtype:
        total.addmm_(d_logits.T, rows)
    else:
        total += d_logits.T @ rows
