"""One model call for a whole step: flatten the picks to rows, run all layers, return the logits asked for.

Two ways to run the layers. `native`: the C++ kernels, in one call for the plain cache, layer by layer for
every other policy. `torch`: the plain model, on any device. Both hand attention to the cache.
"""

from __future__ import annotations

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
        self._np = self._tokens.numpy(), self._positions.numpy(), self._spans.numpy()
        self._tables: tuple[Tensor, Tensor] | None = None  # cosines and sines of positions 0, 1, 2, ...

    def run(self, picks: list[Pick], logit_rows: list[int]) -> tuple[StepRows, Tensor]:
        """Compute the picked tokens. Returns the rows (for `cache.commit`) and logits float32 [R, V] of
        `logit_rows`."""
        tokens, positions, spans = self._np
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
        )
        wanted = torch.tensor(logit_rows, dtype=torch.int32)
        self.cache.begin(rows)
        if self.native is None:
            return rows, self._run_torch(self._tokens[:n], rows, wanted)
        return rows, self._run_native(self.native, self._tokens[:n], rows, wanted)

    def _run_native(self, native: NativeModel, tokens: Tensor, rows: StepRows, wanted: Tensor) -> Tensor:
        whole = self.cache.whole_step(rows)
        if whole is not None:
            return native.step(tokens, rows.cos, rows.sin, whole, wanted)
        x = native.embed(tokens)
        for layer in range(self.cache.shape.num_layers):
            q, k, v = native.layer_in(layer, x)
            native.layer_out(layer, x, self.cache.attend(layer, q, k, v, rows))
        return native.finish(x, wanted)

    @torch.inference_mode()
    def _run_torch(self, tokens: Tensor, rows: StepRows, wanted: Tensor) -> Tensor:
        wide = not isinstance(self.cache.shape.kernels, TorchKernels)  # the C++ kernels take float32 rows

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not wide:
                return self.cache.attend(layer, q, k, v, rows)
            q32, k32, v32 = (x.float().contiguous() for x in (q, k, v))
            return self.cache.attend(layer, q32, k32, v32, rows).to(q.dtype)

        hidden = self.model.run(tokens.to(self.device), rows.positions.to(self.device), attend)
        if not wanted.numel():
            return torch.empty(0, self.model.config.vocab_size)
        return self.model.logits(hidden[wanted.long().to(self.device)]).float()

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
        highest = int(positions.max()) if positions.numel() > 1 else int(positions[0])
        if highest >= _TABLE_LIMIT:  # an endless text must not grow a table without end
            cos, sin = rotary.cos_sin(positions)
            return cos.to(self.device), sin.to(self.device)
        if self._tables is None or highest >= self._tables[0].shape[0]:
            size = max(1024, 1 << (highest + 1).bit_length())
            cos, sin = rotary.cos_sin(torch.arange(size))
            self._tables = cos.to(self.device), sin.to(self.device)
        at = positions.to(self.device)
        return self._tables[0][at], self._tables[1][at]
