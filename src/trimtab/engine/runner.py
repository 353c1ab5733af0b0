"""One model call for a whole step: flatten the picks to rows, run all layers, return the logits asked for.

Two ways to run the layers. `native`: the C++ kernels, in one call for the plain cache, layer by layer for
every other policy. `torch`: the plain model, on any device. Both hand attention to the cache.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trimtab.kernels.reference import TorchKernels
from trimtab.kvcache.base import KVCache, StepRows

if TYPE_CHECKING:
    from trimtab.engine.scheduler import Pick
    from trimtab.kernels.native import NativeModel
    from trimtab.models.transformer import Model

_TABLE_LIMIT = 1 << 16
_FAR = 1 << 12  # positions of the table beyond
_NONE = torch.empty(0)


@dataclass(slots=True)
class StepOutput:
    """What one model call gives: the rows (for `cache.commit`), and for them

    `logits`     float32 [R, V] of the rows asked for;
    `hidden`     float32 [N, D] after the final norm, or None;
    `residuals`  layer -> [N, D], the residual stream that enters it.
    """

    rows: StepRows
    logits: Tensor = _NONE
    hidden: Tensor | None = None
    residuals: dict[int, Tensor] = field(default_factory=dict)


class Runner:
    def __init__(
        self, model: Model, cache: KVCache, native: NativeModel | None, max_step_tokens: int, max_batch: int
    ) -> None:
        self.model = model
        self.cache = cache
        self.native = native
        self.device = cache.shape.device
        self._tokens = torch.empty(max_step_tokens, dtype=torch.int64)
        self._positions = torch.empty(max_step_tokens, dtype=torch.int64)
        self._spans = torch.empty(max_batch, 3, dtype=torch.int32)
        self._wanted = torch.empty(max_step_tokens, dtype=torch.int32)
        self._np = self._tokens.numpy(), self._positions.numpy(), self._spans.numpy(), self._wanted.numpy()
        self._tables: tuple[Tensor, Tensor] | None = None  # cosines and sines of positions 0, 1, 2, ...
        self._far: tuple[int, Tensor, Tensor] | None = None  # first position, cosines and sines from there on

    def run(
        self,
        picks: list[Pick],
        logit_rows: list[int],
        hidden: bool = False,
        residuals: Collection[int] = (),
    ) -> StepOutput:
        """Compute the picked tokens: logits of `logit_rows`, the hidden states of all rows if asked for, and
        the residual stream that enters each layer named in `residuals`."""
        tokens, positions, spans, wanted = self._np
        n = 0
        bounds = []
        for i, pick in enumerate(picks):
            request, first, end = pick.request, pick.request.computed, n + pick.count
            assert request.sequence is not None
            if pick.count == 1:
                tokens[n], positions[n] = request.tokens[first], first
            else:
                tokens[n:end] = request.tokens[first : first + pick.count]
                positions[n:end] = np.arange(first, first + pick.count)
            spans[i] = request.sequence.slot, n, end
            bounds.append((n, end))
            n = end
        where = self._positions[:n]
        cos, sin = self._cos_sin(where, picks, bounds)
        rows = StepRows(
            sequences=[pick.request.sequence for pick in picks],  # type: ignore[misc]
            spans=self._spans[: len(picks)],
            positions=where,
            cos=cos,
            sin=sin,
            bounds=bounds,
            tokens=self._tokens[:n],
        )
        wanted[: len(logit_rows)] = logit_rows
        asked = self._wanted[: len(logit_rows)]
        self.cache.begin(rows)
        out = StepOutput(rows, residuals=dict.fromkeys(residuals, _NONE))
        if self.native is None:
            self._run_torch(self._tokens[:n], out, asked, hidden)
        else:
            self._run_native(self.native, self._tokens[:n], out, asked, hidden)
        return out

    def _run_native(
        self, native: NativeModel, tokens: Tensor, out: StepOutput, wanted: Tensor, hidden: bool
    ) -> None:
        rows = out.rows
        if hidden:
            out.hidden = torch.empty(tokens.shape[0], self.model.config.hidden_size)
        whole = None if out.residuals else self.cache.whole_step(rows)
        if whole is not None:
            out.logits = native.step(tokens, rows.cos, rows.sin, whole, wanted, out.hidden, self.cache.asked)
            return
        x = native.embed(tokens)
        for layer in range(self.cache.shape.num_layers):
            if layer in out.residuals:
                out.residuals[layer] = x.clone()
            if self.cache.wants_layer_input:
                self.cache.layer_input(layer, x, rows)
            q, k, v = native.layer_in(layer, x)
            native.layer_out(layer, x, self.cache.attend(layer, q, k, v, rows))
        out.logits = native.finish(x, wanted, out.hidden)

    @torch.inference_mode()
    def _run_torch(self, tokens: Tensor, out: StepOutput, wanted: Tensor, hidden: bool) -> None:
        rows = out.rows
        wide = not isinstance(self.cache.shape.kernels, TorchKernels)  # the C++ kernels take float32 rows
        wanted_inputs = range(self.cache.shape.num_layers) if self.cache.wants_layer_input else ()
        residuals = dict.fromkeys([*out.residuals, *wanted_inputs], _NONE)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if wanted_inputs:
                self.cache.layer_input(layer, residuals[layer].float(), rows)
                if layer not in out.residuals:
                    del residuals[layer]
            if not wide:
                return self.cache.attend(layer, q, k, v, rows)
            q32, k32, v32 = (x.float().contiguous() for x in (q, k, v))
            return self.cache.attend(layer, q32, k32, v32, rows).to(q.dtype)

        states = self.model.run(tokens.to(self.device), rows.positions.to(self.device), attend, residuals)
        out.residuals = residuals
        if hidden:
            out.hidden = states.float()
        if wanted.numel():
            out.logits = self.model.logits(states[wanted.long().to(self.device)]).float()

    def _far_cos_sin(self, positions: Tensor, highest: int) -> tuple[Tensor, Tensor]:
        """From a table of the next few thousand positions, made anew when a text leaves it."""
        lowest = int(positions.min())
        if self._far is None or not self._far[0] <= lowest <= highest < self._far[0] + _FAR:
            if highest - lowest >= _FAR:
                cos, sin = self.model.rotary.cos_sin(positions)
                return cos.to(self.device), sin.to(self.device)
            cos, sin = self.model.rotary.cos_sin(torch.arange(lowest, lowest + _FAR))
            self._far = lowest, cos.to(self.device), sin.to(self.device)
        first, cos, sin = self._far
        at = (positions - first).to(self.device)
        return cos[at], sin[at]

    def _cos_sin(
        self, positions: Tensor, picks: list[Pick], bounds: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        rotary = self.model.rotary
        if rotary.length_dependent:
            # As when the whole prompt is computed at once and then token by token, however it is chunked.
            lengths = torch.empty_like(positions)
            for pick, (begin, end) in zip(picks, bounds, strict=True):
                lengths[begin:end] = (positions[begin:end] + 1).clamp(min=pick.request.prompt_length)
            cos, sin = rotary.cos_sin(positions, lengths)
            return cos.to(self.device), sin.to(self.device)
        # Numpy, not torch: torch gives the interpreter away for each small operation.
        highest = int(positions.numpy().max())
        if highest >= _TABLE_LIMIT:  # an endless text must not grow a table without end
            return self._far_cos_sin(positions, highest)
        if self._tables is None or highest >= self._tables[0].shape[0]:
            size = max(1024, 1 << (highest + 1).bit_length())
            cos, sin = rotary.cos_sin(torch.arange(size))
            self._tables = cos.to(self.device), sin.to(self.device)
        if positions.numel() == 1:
            return self._tables[0][highest : highest + 1], self._tables[1][highest : highest + 1]
        if self.device.type == "cpu":
            where = positions.numpy()
            return torch.from_numpy(self._tables[0].numpy()[where]), torch.from_numpy(
                self._tables[1].numpy()[where]
            )
        at = positions.to(self.device)
        return self._tables[0][at], self._tables[1][at]
