"""Draws one token for each row of logits.

A row is one node of one request: its parameters, seed, absolute position and tokens. Rows are treated one
by one with the same operations whatever else is in the call, so a token never depends on its neighbours.
The draw itself is the inverse of the cumulative distribution at a counter-based random number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.decoding import processors
from trimtab.decoding.processors import TokenCounts, UserProcessor
from trimtab.decoding.randomness import Purpose, uniform
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.errors import NumericsError

if TYPE_CHECKING:
    import torch

    from trimtab.kernels.native import Library

# Below this, dividing float32 logits by the temperature could give 0 / 0.
_COLDEST = 1e-30
_BLOCK = 256


class Row:
    """Whose logits a row of the batch are.

    Attributes:
        params: the request's settings.
        seed: the sequence's seed (`child_seed` of the request's).
        position: absolute position, in the sequence, of the token to be drawn.
        prompt_ids, output_ids: tokens given and generated so far.
        path: tentative tokens between the output and this node (drafts), oldest first.
        mask: allowed tokens as int32 bit words `[ceil(V / 32)]`, or None for all.
        counts: prompt and output counted already, or None to count them here.
        processors: the user's own parts.
        eos_ids: end tokens of the model, which `min_tokens` forbids at first.
    """

    __slots__ = (
        "counts",
        "eos_ids",
        "mask",
        "output_ids",
        "params",
        "path",
        "position",
        "processors",
        "prompt_ids",
        "seed",
    )

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        position: int,
        prompt_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
        path: Sequence[int] = (),
        mask: Any = None,
        counts: TokenCounts | None = None,
        processors: Sequence[UserProcessor] = (),
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.params = params
        self.seed = seed
        self.position = position
        self.prompt_ids = prompt_ids
        self.output_ids = output_ids
        self.path = path
        self.mask = mask
        self.counts = counts
        self.processors = processors
        self.eos_ids = eos_ids

    @property
    def must_go_on(self) -> bool:
        """Whether `min_tokens` still forbids to stop."""
        wanted = self.params.min_tokens
        return wanted > 0 and len(self.output_ids) + len(self.path) < wanted

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is simply the largest of the raw logits and nothing else is asked for."""
        return (
            self.params.is_plain_greedy and self.mask is None and not self.processors and not self.must_go_on
        )


class Sampled(NamedTuple):
    """A drawn token.

    `logprob` and `top` (the k likeliest as (token, log-probability), best first) are the model's own,
    before any setting; None and () unless `logprobs` was asked for. `error` says what was wrong with the
    row's logits; the token is then -1.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: str | None = None


class Sampler:
    """Draws tokens. `library`: the C++ kernels, if the logits are on the CPU."""

    def __init__(self, library: Library | None = None) -> None:
        self._library = library

    def sample(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Sampled]:
        """One token a row.

        `logits`: `[R, V]`, any float type and device, left unchanged; `rows`: R of them. A row whose logits
        are not numbers, or which forbids every token, comes back with `error` set and leaves the others
        alone.
        """
        assert logits.shape[0] == len(rows), (logits.shape, len(rows))
        if not rows:
            return []
        if logits.device.type != "cpu":
            return self._sample_on_device(logits, rows)
        table = as_numpy(logits)
        if len(rows) == 1 and rows[0].is_plain_greedy:
            return [_sample_row(table[0], rows[0])]
        if all(row.is_plain_greedy for row in rows):
            # One call instead of R; the search is the same for each row.
            tokens = table.argmax(axis=1)
            best = table[np.arange(len(rows)), tokens].tolist()
            pairs = zip(best, tokens.tolist(), strict=True)
            return [Sampled(token) if math.isfinite(x) else _bad(x) for x, token in pairs]
        if self._library is not None:
            return _sample_natively(self._library, table, rows)
        return [_sample_row(values, row) for values, row in zip(table, rows, strict=True)]

    def _sample_on_device(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Sampled]:
        """Greedy rows are decided where the logits are; only the other rows are copied to the CPU."""
        others = [i for i, row in enumerate(rows) if not row.is_plain_greedy]
        results: list[Sampled] = []
        if len(others) < len(rows):
            best, tokens = logits.max(dim=-1)
            pairs = zip(best.tolist(), tokens.tolist(), strict=True)
            results = [Sampled(token) if math.isfinite(x) else _bad(x) for x, token in pairs]
        else:
            results = [Sampled(-1)] * len(rows)
        if others:
            some = logits if len(others) == len(rows) else logits[others]
            for i, values in zip(others, as_numpy(some.cpu()), strict=True):
                results[i] = _sample_row(values, rows[i])
        return results

    def distribution(self, logits: torch.Tensor, row: Row) -> NDArray[np.float64]:
        """The exact law `[V]` that `sample` draws this row's token from; `logits`: `[V]`.

        Raises NumericsError where `sample` would report an error.
        """
        values = as_numpy(logits.cpu() if logits.device.type != "cpu" else logits)
        law = np.zeros(values.size, dtype=np.float64)
        processed = _processed(values, row)
        if isinstance(processed, Sampled):
            raise NumericsError(processed.error or "")
        if row.params.is_greedy:
            law[int(processed.argmax())] = 1.0
            return law
        ids, weights = _survivors(processed, row.params, row.mask is not None)
        law[slice(None) if ids is None else ids] = weights
        return law / law.sum()


def raw_logprobs(
    values: NDArray[np.float32], token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-probability of `token` and the `count` likeliest tokens with theirs, from raw logits `[V]`."""
    largest = values.max()
    shift = float(largest) + math.log(float(np.exp(values - largest).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = processors.keep_top_k(values, count)
        ids = np.arange(values.size) if ids is None else ids
        best = ids[np.argsort(-values[ids], kind="stable")][:count]
        top = tuple((int(i), float(values[i]) - shift) for i in best)
    return float(values[token]) - shift, top


def as_numpy(logits: torch.Tensor) -> NDArray[np.float32]:
    """A CPU tensor as a float32 array, without a copy where it is float32 already."""
    import torch

    if logits.dtype is not torch.float32:
        logits = logits.to(torch.float32)
    return np.ascontiguousarray(logits.detach().numpy())


def _sample_row(values: NDArray[np.float32], row: Row) -> Sampled:
    if row.is_plain_greedy:
        token = values.argmax()
        # NaN counts as the largest for argmax, so one look tells.
        best = values[token]
        return Sampled(int(token)) if math.isfinite(best) else _bad(best)
    processed = _processed(values, row)
    if isinstance(processed, Sampled):
        return processed
    params = row.params
    if params.temperature == 0:
        token = int(processed.argmax())
    else:
        ids, weights = _survivors(processed, params, row.mask is not None)
        at = _draw(weights, uniform(row.seed, row.position, Purpose.SAMPLE))
        token = at if ids is None else int(ids[at])
    if params.logprobs is None:
        return Sampled(token)
    return Sampled(token, *raw_logprobs(values, token, params.logprobs))


def _sample_natively(library: Library, table: NDArray[np.float32], rows: Sequence[Row]) -> list[Sampled]:
    """What `_sample_row` does, with masks, truncation and drawing of all rows in one call."""
    from trimtab.kernels.native_sampling import Wanted, draw

    results: list[Sampled | None] = [None] * len(rows)
    wanted: list[Wanted] = []
    places: list[int] = []
    for i, (values, row) in enumerate(zip(table, rows, strict=True)):
        params = row.params
        logits = values
        if row.must_go_on or row.processors or params.has_penalties or params.logit_bias:
            largest = values.max()
            if not math.isfinite(largest):
                results[i] = _bad(largest)
                continue
            logits = _adjusted(values, row)
        u = 0.0 if params.temperature == 0 else uniform(row.seed, row.position, Purpose.SAMPLE)
        wanted.append(
            Wanted(logits, row.mask, params.temperature, params.top_k, params.top_p, params.min_p, u)
        )
        places.append(i)
    for i, (token, largest) in zip(places, draw(library, wanted) if wanted else [], strict=True):
        params = rows[i].params
        if token < 0:
            results[i] = _bad(largest)
        elif params.logprobs is None:
            results[i] = Sampled(token)
        else:
            results[i] = Sampled(token, *raw_logprobs(table[i], token, params.logprobs))
    return results  # type: ignore[return-value]


def _processed(values: NDArray[np.float32], row: Row) -> NDArray[np.float32] | Sampled:
    """The row's logits after everything that comes before temperature; or what is wrong with them."""
    largest = values.max()
    if not math.isfinite(largest):
        return _bad(largest)
    params = row.params
    masked = row.mask is not None or row.must_go_on
    if not (masked or row.processors or params.has_penalties or params.logit_bias):
        return values
    logits = _adjusted(values, row)
    if row.mask is not None:
        processors.apply_mask(logits, row.mask)
    largest = logits.max()
    return logits if math.isfinite(largest) else _bad(largest)


def _adjusted(values: NDArray[np.float32], row: Row) -> NDArray[np.float32]:
    """A copy of the row's logits after penalties, biases, the user's parts and `min_tokens`."""
    params = row.params
    logits = values.copy()
    if params.has_penalties:
        processors.apply_penalties(
            logits,
            row.counts or TokenCounts(row.prompt_ids, row.output_ids),
            row.path,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
        )
    if params.logit_bias:
        processors.apply_bias(logits, params.logit_bias)
    if row.processors:
        logits = processors.apply_user_processors(logits, row, row.processors)
    if row.must_go_on:
        processors.forbid(logits, row.eos_ids.union(params.stop_token_ids or ()))
    return logits


def _survivors(
    logits: NDArray[np.float32], params: SamplingParams, masked: bool
) -> tuple[NDArray[np.intp] | None, NDArray[np.float32]]:
    """Ids (ascending; None: all) and weights (probabilities up to a factor, the largest 1) of the tokens
    left after temperature, top-k, top-p and min-p. `masked`: many may be forbidden; look at the rest only."""
    allowed = None if not masked else np.flatnonzero(logits > processors.NEVER)
    if allowed is not None:
        logits = logits[allowed]
    ids, weights = _weights(logits - logits.max(), params)
    if allowed is None:
        return ids, weights
    return (allowed if ids is None else allowed[ids]), weights


def _weights(
    scores: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.intp] | None, NDArray[np.float32]]:
    """The same from scores whose largest is 0, which are changed."""
    if params.temperature != 1.0:
        scores /= np.float32(max(params.temperature, _COLDEST))
    ids = processors.keep_top_k(scores, params.top_k)
    if ids is not None:
        scores = scores[ids]
    weights = np.exp(scores, out=scores)
    if params.top_p < 1.0:
        ids, weights = _only(ids, weights, processors.keep_top_p(weights, params.top_p))
    if params.min_p > 0.0:
        ids, weights = _only(ids, weights, processors.keep_min_p(weights, params.min_p))
    return ids, weights


def _only(
    ids: NDArray[np.intp] | None, weights: NDArray[np.float32], keep: NDArray[np.intp] | None
) -> tuple[NDArray[np.intp] | None, NDArray[np.float32]]:
    if keep is None:
        return ids, weights
    return (keep if ids is None else ids[keep]), weights[keep]


def _draw(weights: NDArray[np.float32], u: float) -> int:
    """Position of the first cumulative weight above `u` times the whole; never one of weight zero.

    Large vocabularies are searched in two steps, first blocks and then within one: running sums are slow.
    """
    exact = weights.astype(np.float64)
    if exact.size <= 2 * _BLOCK:
        cumulative = exact.cumsum()
        return _first_above(cumulative, u * cumulative[-1])
    sums = np.add.reduceat(exact, np.arange(0, exact.size, _BLOCK)).cumsum()
    target = u * sums[-1]
    block = _first_above(sums, target)
    start = block * _BLOCK
    inside = exact[start : start + _BLOCK].cumsum()
    return start + _first_above(inside, target - sums[block - 1] if block else target)


def _first_above(cumulative: NDArray[np.float64], target: float) -> int:
    """First position above `target`; where rounding leaves none, the last one that adds something."""
    at = int(cumulative.searchsorted(target, side="right"))
    return at if at < cumulative.size else int(cumulative.searchsorted(cumulative[-1], side="left"))


def _bad(largest: float) -> Sampled:
    """What the largest logit of a row says is wrong with it."""
    if largest == -math.inf:
        reason = "no token is allowed: every logit is -inf; loosen the constraint, logit_bias or min_tokens"
    elif largest == math.inf:
        reason = "the model's logits are infinite; try a wider dtype (float32)"
    else:
        reason = "the model's logits are not numbers (NaN); check the weights, or try a wider dtype (float32)"
    return Sampled(-1, error=reason)
