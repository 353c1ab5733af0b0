"""The kernels of `native.Library` in plain torch: for GPUs, for machines without a compiler, and as their oracle.

One sequence at a time, so it is simple before it is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels import reference_packed
from trimtab.kernels.paged import PAGE, PagedRows


class TorchKernels:
    """Same methods and meaning as `native.Library`; tensors may be on any device."""

    threads = 0
    write_packed = staticmethod(reference_packed.write_packed)
    attend_packed = staticmethod(reference_packed.attend_packed)
    pack = staticmethod(reference_packed.pack)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        half = x.shape[-1] // 2
        a, b = x[..., :half].clone(), x[..., half:].clone()
        c, s = cos[:, None].to(x.device), sin[:, None].to(x.device)
        x[..., :half] = a * c - b * s
        x[..., half:] = b * c + a * s

    def write(self, rows: PagedRows, k: Tensor, v: Tensor) -> None:
        d = rows.head_dim
        pages = rows.arena.view(-1, 2, PAGE * d)
        for seq, begin, end in rows.spans.tolist():
            for head in range(rows.num_kv_heads):
                base = rows.held(seq, head)
                at = torch.arange(base, base + end - begin)
                page = rows.pages(seq, head, (base + end - begin + PAGE - 1) // PAGE)[at // PAGE].to(
                    pages.device
                )
                at = (at % PAGE).to(pages.device)
                keys = pages[:, 0].view(-1, d, PAGE)
                keys[page, :, at] = k[begin:end, head].to(pages.dtype)
                values = pages[:, 1].view(-1, PAGE, d)
                values[page, at] = v[begin:end, head].to(pages.dtype)

    def attend(self, rows: PagedRows, q: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        for index, (seq, begin, end) in enumerate(rows.spans.tolist()):
            for head in range(rows.num_kv_heads):
                heads = self._group(rows, head)
                scores, value = self._scores(rows, q, index, seq, begin, end, head)
                z = torch.logsumexp(scores, -1)
                p = torch.exp(scores - z.masked_fill(z == -torch.inf, 0)[..., None])
                out[begin:end, heads] = torch.einsum("ngt,td->ngd", p, value).to(out.dtype)
                lse[begin:end, heads] = z
        return out, lse

    def column_sums(self, rows: PagedRows, q: Tensor, lse: Tensor, sums: Tensor, first_row: int = 0) -> None:
        for index, (seq, begin, end) in enumerate(rows.spans.tolist()):
            for head in range(rows.num_kv_heads):
                scores, _ = self._scores(rows, q, index, seq, begin, end, head)
                p = torch.exp(scores - lse[begin:end, self._group(rows, head)][..., None])
                sums[index, head, : p.shape[-1]] += p[first_row:].sum((0, 1))

    @staticmethod
    def _group(rows: PagedRows, head: int) -> slice:
        group = rows.num_heads // rows.num_kv_heads
        return slice(head * group, (head + 1) * group)

    def _scores(
        self, rows: PagedRows, q: Tensor, index: int, seq: int, begin: int, end: int, head: int
    ) -> tuple[Tensor, Tensor]:
        """Masked scores float32 [n, group, T] and values float32 [T, d] of one span's one KV head."""
        d, n, device = rows.head_dim, end - begin, q.device
        base = rows.held(seq, head)
        total = base + n
        pages = rows.arena.view(-1, 2, PAGE * d)[rows.pages(seq, head, (total + PAGE - 1) // PAGE).to(device)]
        key = pages[:, 0].reshape(-1, d, PAGE).permute(1, 0, 2).reshape(d, -1)[:, :total].float()
        value = pages[:, 1].reshape(-1, d)[:total].float()
        row = torch.arange(n, device=device)[:, None]
        at = torch.arange(total, device=device)[None]
        high = base + row + 1 if rows.causal_new else torch.full_like(row, total)
        seen = at < high
        if rows.window:
            seen &= at >= high - rows.window
        if rows.mask is not None:
            lengths = [(e - b) ** 2 for _, b, e in rows.spans.tolist()[:index]]
            square = rows.mask[sum(lengths) : sum(lengths) + n * n].view(n, n).bool()
            seen[:, base:] &= square
        query = q[begin:end, self._group(rows, head)].float() * rows.scale
        scores = torch.einsum("ngd,dt->ngt", query, key)
        return scores.masked_fill(~seen[:, None], -torch.inf), value
