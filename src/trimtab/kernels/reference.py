"""The kernels of `native.Library` in plain torch: for GPUs, machines without a compiler, and as an oracle.

Sequences with equally many new rows are computed together, so a decode step is a handful of torch calls a
layer however many requests it serves. Keys and values are gathered out of their pages first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.kernels import reference_coded
from trimtab.kernels.paged import PAGE, PagedRows


class TorchKernels:
    """Same methods and meaning as `native.Library`; tensors may be on any device."""

    write_coded = staticmethod(reference_coded.write_coded)
    attend_coded = staticmethod(reference_coded.attend_coded)
    attend_top_coded = staticmethod(reference_coded.attend_top_coded)
    column_sums_coded = staticmethod(reference_coded.column_sums_coded)
    code = staticmethod(reference_coded.code)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        half = x.shape[-1] // 2
        a, b = x[..., :half].clone(), x[..., half:].clone()
        c, s = cos[:, None].to(x.device), sin[:, None].to(x.device)
        x[..., :half] = a * c - b * s
        x[..., half:] = b * c + a * s

    def write(self, rows: PagedRows, k: Tensor, v: Tensor) -> None:
        keys, values = _key_pages(rows), _value_pages(rows)
        for same in _alike(rows):
            at = same.held[..., None] + torch.arange(same.count)  # [B, G, n]
            new = same.rows.to(k.device)
            page, inside = same.pages(rows, at // PAGE).to(keys.device), (at % PAGE).to(keys.device)
            keys[page, :, inside] = k[new].transpose(1, 2).to(keys)
            page, inside = same.value_pages(rows, at // PAGE).to(values.device), inside.to(values.device)
            values[page, inside] = v[new].transpose(1, 2).to(values)

    def attend(self, rows: PagedRows, q: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        for same in _alike(rows):
            scores, seen, at = _scores(rows, same, q)
            value = _values(rows, same, seen, at)
            z = torch.logsumexp(scores, -1)
            p = torch.exp(scores - z.masked_fill(z == -torch.inf, 0)[..., None])
            new = same.rows.to(q.device)
            mixed = torch.einsum("bgnxt,bgtd->bngxd", p, value).flatten(2, 3)
            out[new] = mixed.to(out.dtype)
            lse[new] = z.transpose(1, 2).flatten(2, 3)
        return out, lse

    def attend_top(
        self, rows: PagedRows, q: Tensor, n: int, renormalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        fetched = torch.zeros(q.shape[0], rows.num_kv_heads, dtype=torch.int32)
        for same in _alike(rows):
            scores, _, at = _scores(rows, same, q)
            z = torch.logsumexp(scores, -1)
            order = scores.argsort(dim=-1, descending=True, stable=True)[..., :n]
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
            p = torch.exp(scores - z[..., None]).masked_fill(~chosen, 0)
            wanted = (chosen & (scores > -torch.inf)).any(3)  # by any head of the group: [B, G, n, T]
            most = int(wanted.sum(-1).max())
            index = wanted.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
            value = _fetch(rows, same, at[index], wanted.gather(-1, index))
            if renormalize:
                p = p / p.sum(-1, keepdim=True)
            p = p.gather(-1, index[:, :, :, None].expand(*p.shape[:-1], -1))
            new = same.rows.to(q.device)
            mixed = torch.einsum("bgnxu,bgnud->bngxd", p, value).flatten(2, 3)
            out[new] = mixed.to(out.dtype)
            lse[new] = z.transpose(1, 2).flatten(2, 3)
            fetched[same.rows] = wanted.sum(-1).transpose(1, 2).int().cpu()
        return out, lse, fetched

    def merge(self, segments: list[tuple[Tensor, Tensor]]) -> Tensor:
        if len(segments) == 1:
            return segments[0][0]
        outs, lses = zip(*segments, strict=True)
        return merge_segments(list(outs), list(lses))[0].to(outs[0].dtype)

    def column_sums(self, rows: PagedRows, q: Tensor, lse: Tensor, sums: Tensor, first_row: int = 0) -> None:
        for same in _alike(rows):
            scores, _, at = _scores(rows, same, q)
            z = lse[same.rows.to(q.device)].unflatten(2, (rows.num_kv_heads, -1)).transpose(1, 2)
            p = torch.exp(scores - z[..., None])
            at = at[at < sums.shape[2]].to(sums.device)
            sums[same.spans[:, None].to(sums.device), :, at] += (
                p[:, :, first_row:, :, : len(at)].sum((2, 3)).transpose(1, 2)
            )

    def moments(self, q: Tensor, total: Tensor, outer: Tensor) -> None:
        total += q.sum(1)
        outer += torch.einsum("lnhi,lnhj->lhij", q, q)


@dataclass(slots=True)
class _Alike:
    """Spans with equally many new rows, and where their sequences lie."""

    spans: Tensor  # int64 [B], numbers of the spans
    slots: Tensor  # int64 [B]
    rows: Tensor  # int64 [B, n], numbers of the new rows
    count: int  # n
    held: Tensor  # int64 [B, G], rows held before this step

    def pages(self, rows: PagedRows, index: Tensor) -> Tensor:
        """Page numbers int64 [B, G, n] of pages `index` [n] or [B, G, n] of each head; beyond a head's last
        page they are arbitrary ones."""
        heads = torch.arange(rows.num_kv_heads)
        first = rows.table_offset + self.slots[:, None] * rows.table_seq + heads * rows.table_head
        flat = rows.table.flatten()
        if rows.ring:
            again = rows.fixed + (index - rows.fixed) % rows.ring
            index = torch.where(index < rows.fixed, index, again)
        entries = (first[..., None] + index).clamp(max=flat.numel() - 1)
        return flat[entries].long() * rows.page_mul + rows.page_add + (heads * rows.page_head)[:, None]

    def value_pages(self, rows: PagedRows, index: Tensor) -> Tensor:
        """The same for values."""
        if rows.value_table is not None:
            rows = replace(rows, table=rows.value_table)
        return self.pages(rows, index)


def _alike(rows: PagedRows) -> Iterator[_Alike]:
    by_count: dict[int, list[int]] = defaultdict(list)
    spans = rows.spans.tolist()
    for i, (_, begin, end) in enumerate(spans):
        if end > begin:
            by_count[end - begin].append(i)
    heads = torch.arange(rows.num_kv_heads)
    for count, which in by_count.items():
        slots = torch.tensor([spans[i][0] for i in which])
        first = torch.tensor([spans[i][1] for i in which])
        at = rows.start_offset + slots[:, None] * rows.start_seq + heads * rows.start_head
        yield _Alike(
            spans=torch.tensor(which),
            slots=slots,
            rows=first[:, None] + torch.arange(count),
            count=count,
            held=rows.start.flatten()[at].long(),
        )


def _key_pages(rows: PagedRows) -> Tensor:
    """All pages of keys, [pages, d, 16]."""
    d = rows.head_dim
    pages = rows.arena.view(-1, 1 if rows.values is not None else 2, PAGE * d)
    return pages[:, 0].unflatten(-1, (d, PAGE))


def _value_pages(rows: PagedRows) -> Tensor:
    """All pages of values, [pages, 16, d]."""
    d = rows.head_dim
    pages = rows.arena.view(-1, 2, PAGE * d)[:, 1] if rows.values is None else rows.values.view(-1, PAGE * d)
    return pages.unflatten(-1, (PAGE, d))


def _values(rows: PagedRows, same: _Alike, seen: Tensor, at: Tensor) -> Tensor:
    """Values float32 [B, G, T, d] of keys `at` [T], which are whole pages; 0 where nobody sees one."""
    pages = _value_pages(rows)
    page = same.value_pages(rows, at[::PAGE].cpu() // PAGE)
    value = pages[page.to(pages.device)].to(at.device).flatten(2, 3).float()
    # Rows that nobody sees may be memory never written, and zero times NaN is NaN.
    return value.masked_fill(~seen.any(2)[..., None], 0)


def _fetch(rows: PagedRows, same: _Alike, index: Tensor, wanted: Tensor) -> Tensor:
    """Values float32 [B, G, n, U, d] of rows `index` [B, G, n, U]; only those `wanted` are moved."""
    pages, device = _value_pages(rows), index.device
    index, asked = index.cpu(), wanted.cpu()
    page = same.value_pages(rows, index.flatten(2) // PAGE).view(index.shape)
    found = pages[page[asked].to(pages.device), (index % PAGE)[asked].to(pages.device)]
    value = torch.zeros(*index.shape, pages.shape[-1], device=device)
    value[wanted] = brought(found, device).float()
    return value


def brought(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; from host memory to a GPU on a stream of its own, so that work queued before it and
    the copy run side by side."""
    if x.device == device or device.type != "cuda":
        return x.to(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        there = x.pin_memory().to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(stream)
    there.record_stream(torch.cuda.current_stream(device))
    return there


def _scores(rows: PagedRows, same: _Alike, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores float32 [B, G, n, group, T], what is seen [B, G, n, T], and which keys these are [T]."""
    n, device = same.count, q.device
    total = same.held + n  # [B, G]
    window, sinks = _windows(rows)
    pages = torch.arange(-(-int(total.max()) // PAGE))
    if window is not None and int(window.min()) > 0:  # pages between sinks and windows may be gone
        first = int((same.held + 1 - window.cpu()[:, 0]).min())
        pages = pages[(pages < -(-int(sinks.max()) // PAGE)) | (pages >= first // PAGE)]
    keys = _key_pages(rows)
    key = keys[same.pages(rows, pages).to(keys.device)].to(device)  # [B, G, pages, d, 16]
    key = key.transpose(2, 3).flatten(3).float()
    at = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten().to(device)
    base, row = same.held.to(device)[..., None], torch.arange(n, device=device)
    high = base + row + 1 if rows.causal_new else (base + n).expand(-1, -1, n)  # [B, G, n]
    seen = at < high[..., None]
    if window is not None:
        end = high if rows.depth is None else base + rows.depth[same.rows].to(device)[:, None]
        limit = torch.where(window > 0, end - window, 0)
        seen &= (at >= limit[..., None]) | (at < sinks[..., None])
    if rows.mask is not None:
        seen &= _visible_new(rows, same, at, base)

    def ask(queries: Tensor) -> Tensor:
        query = queries[same.rows.to(device)].unflatten(2, (rows.num_kv_heads, -1)).float() * rows.scale
        return torch.einsum("bngxd,bgdt->bgnxt", query, key)

    scores = ask(q)
    if rows.q_sinks is not None:
        scores = torch.where((at < sinks)[:, None, None], ask(rows.q_sinks), scores)
    return scores.masked_fill(~seen[:, :, :, None], -torch.inf), seen, at


def _windows(rows: PagedRows) -> tuple[Tensor | None, Tensor]:
    """Each KV head's window and sinks, [G, 1]; None where all heads see everything."""
    if rows.head_window is None:
        return torch.tensor([[rows.window]]) if rows.window else None, torch.tensor([[0]])
    assert rows.head_sinks is not None
    mine = slice(rows.head_offset, rows.head_offset + rows.num_kv_heads)
    device = rows.arena.device
    return rows.head_window[mine, None].to(device), rows.head_sinks[mine, None].to(device)


def _visible_new(rows: PagedRows, same: _Alike, at: Tensor, base: Tensor) -> Tensor:
    """Bool [B, G, n, T]: what the mask among new rows allows; older keys are all visible."""
    assert rows.mask is not None
    sizes = rows.spans[:, 2].long() - rows.spans[:, 1].long()
    first = (sizes.square().cumsum(0) - sizes.square())[same.spans]
    n = same.count
    squares = rows.mask[(first[:, None] + torch.arange(n * n)).to(rows.mask.device)].view(-1, 1, n, n).bool()
    new = (at - base).clamp(0, n - 1)[:, :, None].expand(-1, -1, n, -1)  # [B, G, n, T]
    allowed = squares.to(at.device).expand(-1, base.shape[1], -1, -1).gather(3, new)
    return allowed | (at < base)[:, :, None]


def merge_segments(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of segments, from each one's out [N, H, d] and logsumexp [N, H] (float32).

    A segment without visible keys has logsumexp -inf and counts nothing.
    """
    lse = torch.stack(lses)
    top = lse.max(0).values
    weight = torch.exp(lse - top.masked_fill(top == -torch.inf, 0))
    total = weight.sum(0)
    mixed = sum(w[..., None] * o.float() for w, o in zip(weight, outs, strict=True))
    assert isinstance(mixed, Tensor)
    return mixed / total.clamp_min(1e-38)[..., None], top + torch.log(total)
