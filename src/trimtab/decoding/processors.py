"""What happens to one row of logits before a token is drawn, step by step, in this order:

penalties and `logit_bias`; user processors; the constraint mask and `min_tokens`; temperature; top-k;
top-p; min-p.

Everything works on a single row (numpy, float32) that belongs to one node of one request, with that
node's own path of tokens. A row is never processed together with others, so its result cannot depend on
them. Definitions are those of vLLM and `transformers`; ties are broken towards the lower token id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import RequestError

if TYPE_CHECKING:
    import torch

    from trimtab.decoding.sampler import Row

Logits = NDArray[np.float32]  # [V]
NEVER = np.float32(-np.inf)
_BLOCK = 32


class UserProcessor(Protocol):
    """A part of the user's own that changes logits, called once a row.

    Gets the logits `[V]` (float32, on the CPU, after penalties and `logit_bias`; may be changed in place)
    and the row they belong to, with its tokens; returns logits `[V]`. `-inf` forbids a token.
    """

    def __call__(self, logits: torch.Tensor, row: Row) -> torch.Tensor: ...


class TokenCounts:
    """Which tokens a sequence holds, kept up to date token by token, for the penalties.

    Optional help for a caller that samples many tokens of one sequence: without it the counts are taken
    anew from the row's tokens at every draw. Tentative tokens (`Row.path`) are never added.
    """

    __slots__ = ("output", "prompt")

    def __init__(self, prompt_ids: Iterable[int] = (), output_ids: Iterable[int] = ()) -> None:
        self.prompt = frozenset(prompt_ids)
        self.output: dict[int, int] = {}
        for token in output_ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Count one more generated token."""
        self.output[token] = self.output.get(token, 0) + 1


def apply_penalties(
    logits: Logits,
    counts: TokenCounts,
    path: Sequence[int],
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Repetition over prompt and output, then frequency and presence over output only; in place.

    `path` are tentative tokens after the output; they count as output.
    """
    output = counts.output
    if path:
        output = dict(output)
        for token in path:
            output[token] = output.get(token, 0) + 1
    if repetition != 1.0:
        seen = counts.prompt.union(output) if output else counts.prompt
        ids = np.fromiter(seen, dtype=np.int64, count=len(seen))
        values = logits[ids]
        factor = np.float32(repetition)
        logits[ids] = np.where(values > 0, values / factor, values * factor)
    if output and (presence or frequency):
        ids = np.fromiter(output.keys(), dtype=np.int64, count=len(output))
        times = np.fromiter(output.values(), dtype=np.float32, count=len(output))
        logits[ids] -= np.float32(frequency) * times
        logits[ids] -= np.float32(presence)


def apply_bias(logits: Logits, biases: Mapping[int, float]) -> None:
    """Add a number to the logits of some tokens; in place."""
    ids = np.fromiter(biases.keys(), dtype=np.int64, count=len(biases))
    logits[ids] += np.fromiter(biases.values(), dtype=np.float32, count=len(biases))


def apply_user_processors(logits: Logits, row: Row, processors: Sequence[UserProcessor]) -> Logits:
    """Run the user's parts one after the other; RequestError if one returns something else than logits."""
    import torch

    tensor = torch.from_numpy(logits)
    for processor in processors:
        result = processor(tensor, row)
        if not isinstance(result, torch.Tensor) or result.shape != tensor.shape:
            shown = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise RequestError(
                f"the logits processor {_name(processor)} returned {shown}; it must return a tensor of shape "
                f"{tuple(tensor.shape)}"
            )
        tensor = result
    return np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())


def apply_mask(logits: Logits, mask: Any) -> None:
    """Forbid the tokens whose bit is 0; in place.

    `mask`: int32 words `[ceil(V / 32)]`, a tensor or an array; bit `i % 32` of word `i // 32` is token i.
    """
    words = np.asarray(mask)
    needed = -(-logits.size // 32)
    if words.shape != (needed,) or words.dtype.itemsize != 4:
        raise RequestError(
            f"a constraint mask has shape {words.shape} of {words.dtype}; a vocabulary of {logits.size} "
            f"tokens needs int32 words of shape ({needed},)"
        )
    little_endian = np.ascontiguousarray(words).astype("<i4", copy=False)
    bits = np.unpackbits(little_endian.view(np.uint8), bitorder="little", count=logits.size)
    np.copyto(logits, NEVER, where=np.logical_not(bits.view(np.bool_)))


def forbid(logits: Logits, tokens: Iterable[int]) -> None:
    """Make some tokens impossible; in place."""
    ids = [token for token in tokens if token < logits.size]
    logits[ids] = NEVER


def keep_top_k(scores: NDArray[np.floating], k: int) -> NDArray[np.intp] | None:
    """Ids (ascending) of the k largest scores; ties with the k-th are all kept. None: keeps every token."""
    if k <= 0 or k >= scores.size:
        return None
    if scores.size < 2 * _BLOCK * k:
        kth = np.partition(scores, scores.size - k)[scores.size - k]
        return np.flatnonzero(scores >= kth)
    # k blocks have a largest score of at least this, so the k-th score of all is no smaller.
    largest = np.maximum.reduceat(scores, np.arange(0, scores.size, _BLOCK))
    bound = np.partition(largest, largest.size - k)[largest.size - k]
    ids = np.flatnonzero(scores >= bound)
    few = scores[ids]
    kth = np.partition(few, few.size - k)[few.size - k]
    return ids[few >= kth]


def keep_top_p(weights: NDArray[np.float32], p: float) -> NDArray[np.intp] | None:
    """Positions (ascending) of the likeliest tokens that together reach probability `p`, at least one.

    `weights` are probabilities up to a factor. Of equally likely tokens at the edge the first are kept.
    """
    if p >= 1.0:
        return None
    # A token goes when it and everything less likely fit into 1 - p. Tokens this unlikely fit for sure, all
    # of them together, so the rest alone is worth sorting.
    exact = weights.astype(np.float64)
    total = exact.sum()
    allowance = (1.0 - p) * total
    ids = np.flatnonzero(exact > allowance / weights.size)
    rest = exact[ids]
    allowance -= total - rest.sum()
    ascending = np.sort(weights[ids]).astype(np.float64)
    kept = rest.size - int(ascending.cumsum().searchsorted(allowance, side="right"))
    edge = ascending[-max(1, kept)]
    keep = rest > edge
    missing = max(1, kept) - int(np.count_nonzero(keep))
    keep[np.flatnonzero(rest == edge)[:missing]] = True
    return ids[keep]


def keep_min_p(weights: NDArray[np.float32], p: float) -> NDArray[np.intp] | None:
    """Positions (ascending) of tokens at least `p` times as likely as the likeliest."""
    if p <= 0.0:
        return None
    return np.flatnonzero(weights >= np.float32(p) * weights.max())


def _name(processor: object) -> str:
    return getattr(processor, "__name__", type(processor).__name__)
