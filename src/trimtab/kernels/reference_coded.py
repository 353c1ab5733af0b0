"""Coded rows in plain torch, bit for bit the same codes as the C++ kernels: an oracle and a fallback.

Codes are addressed one by one through index arithmetic, for any number of rows of all heads at once; they
are unpacked at every call, so this is not a fast path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels.coded import CodedTables
from trimtab.kernels.paged import PAGE


def write_coded(c: CodedTables, k: Tensor, v: Tensor) -> None:
    """Store the new rows k, v [N, G, d] of every span in full."""
    for slot, begin, end in c.rows.spans.tolist():
        for head in range(c.rows.num_kv_heads):
            at = torch.arange(end - begin) + c.rows.held(slot, head)
            for full, new in zip(full_rows(c), (k, v), strict=True):
                page, inside = full.locate(slot, head, at)
                full.rows[page, inside] = new[begin:end, head].to(full.rows)


def code(c: CodedTables, slot: int, layers: int, k_to: Tensor, v_to: Tensor) -> None:
    """Code keys up to `k_to` and values up to `v_to` (int32 [L, G]) of one sequence."""
    r = c.rows
    before = r.table_offset, r.start_offset
    for layer in range(layers):
        r.table_offset, r.start_offset = layer * r.table_layer, layer * r.start_layer
        for head in range(r.num_kv_heads):
            for keys, full, to in zip((True, False), full_rows(c), (k_to, v_to), strict=True):
                at = torch.arange(done(c, slot, head, keys), int(to[layer, head]))
                if len(at):
                    page, inside = full.locate(slot, head, at)
                    x = full.rows[page, inside].float()
                    by_channel = keys and not c.by_token
                    places(c, slot, head, at, keys).store(*_quantize(x, c.bits, c.group, by_channel))
    r.table_offset, r.start_offset = before


def attend_coded(c: CodedTables, q: Tensor) -> tuple[Tensor, Tensor]:
    """(out [N, H, d], logsumexp [N, H]) of rotated q [N, H, d] over coded and full rows."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    for _, slot, head, new, heads, scores in _scored(c, q):
        z = scores.logsumexp(-1)
        value = unpacked_rows(c, slot, head, torch.arange(scores.shape[-1]), keys=False)
        out[new, heads] = torch.einsum("ngt,td->ngd", torch.exp(scores - z[..., None]), value).to(q.dtype)
        lse[new, heads] = z
    return out, lse


def attend_top_coded(c: CodedTables, q: Tensor, n: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend_coded` with the values of each query head's `n` largest probabilities alone, and how many
    rows of them were fetched: int32 [N, G, 2], coded ones and those in full."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    fetched = torch.zeros(q.shape[0], c.rows.num_kv_heads, 2, dtype=torch.int32)
    for _, slot, head, new, heads, scores in _scored(c, q):
        z = scores.logsumexp(-1)
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., :n]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True) & (scores > -torch.inf)
        p = torch.exp(scores - z[..., None]).masked_fill(~chosen, 0)
        if renormalize:
            p = p / p.sum(-1, keepdim=True)
        wanted = chosen.any(1).cpu()  # by any head of the group: [n, T]
        index = wanted.any(0).nonzero()[:, 0]
        value = unpacked_rows(c, slot, head, index, keys=False)
        out[new, heads] = torch.einsum("ngt,td->ngd", p[..., index.to(p.device)], value).to(q.dtype)
        lse[new, heads] = z
        coded = done(c, slot, head, keys=False)
        fetched[new, head, 0] = wanted[:, :coded].sum(-1).int()
        fetched[new, head, 1] = wanted[:, coded:].sum(-1).int()
    return out, lse, fetched


def column_sums_coded(c: CodedTables, q: Tensor, lse: Tensor, sums: Tensor, first_row: int = 0) -> None:
    """Add the attention each held key receives to `sums` float32 [spans, G, keys]."""
    for span, _, head, new, heads, scores in _scored(c, q):
        p = torch.exp(scores - lse[new, heads][..., None])
        sums[span, head, : p.shape[-1]] += p[first_row:].sum((0, 1))


def _scored(c: CodedTables, q: Tensor) -> Iterator[tuple[int, int, int, slice, slice, Tensor]]:
    """For each span and head: span, slot, head, its rows, its query heads, scores [n, group, T]."""
    r = c.rows
    group, skip = r.num_heads // r.num_kv_heads, 0
    for span, (slot, begin, end) in enumerate(r.spans.tolist()):
        n = end - begin
        for head in range(r.num_kv_heads if n else 0):
            base = r.held(slot, head)
            seen = torch.arange(base + n)[None] < base + torch.arange(n)[:, None] + 1
            if r.mask is not None:
                seen[:, base:] &= r.mask[skip : skip + n * n].view(n, n).bool()
            key = unpacked_rows(c, slot, head, torch.arange(base + n), keys=True)
            heads = slice(head * group, (head + 1) * group)
            scores = torch.einsum("ngd,td->ngt", q[begin:end, heads].float() * r.scale, key)
            scores = scores.masked_fill(~seen.to(q.device)[:, None], -torch.inf)
            yield span, slot, head, slice(begin, end), heads, scores
        skip += n * n


def unpacked(c: CodedTables, slot: int, head: int, total: int) -> tuple[Tensor, Tensor]:
    """k and v float32 [total, d] of one layer's one head as attention sees them."""
    k, v = (unpacked_rows(c, slot, head, torch.arange(total), keys) for keys in (True, False))
    return k, v


def unpacked_rows(c: CodedTables, slot: int, head: int, at: Tensor, keys: bool) -> Tensor:
    """Keys or values float32 [n, d] of rows `at` (ascending) of one layer's one head as attention sees them,
    where keys lie. From another memory codes come as bytes, and with their constants."""
    coded = int((at < done(c, slot, head, keys)).sum())
    full, device = full_rows(c)[0 if keys else 1], c.arena.device
    old = places(c, slot, head, at[:coded], keys).load(device)
    rest = full.rows[full.locate(slot, head, at[coded:])].to(device).float()
    return torch.cat([old, rest])


def done(c: CodedTables, slot: int, head: int, keys: bool) -> int:
    """Keys (or values) coded of one layer's one head."""
    at = c.rows.start_offset + slot * c.rows.start_seq + head * c.rows.start_head
    return int((c.k_done if keys else c.v_done).flatten()[at])


@dataclass(slots=True)
class Full:
    """The pages of K or V in full."""

    c: CodedTables
    rows: Tensor  # [pages, 16, d]
    table: Tensor

    def locate(self, slot: int, head: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """Page and place in the page of rows `at` of one layer's one head."""
        device = self.rows.device
        return _entries(self.c, self.table, slot, head, at // PAGE).to(device), (at % PAGE).to(device)


def full_rows(c: CodedTables) -> tuple[Full, Full]:
    """Of K and of V."""
    d = c.rows.head_dim
    keys = c.rows.arena.view(-1, d, PAGE).transpose(1, 2)
    values = c.values.view(c.rows.arena.dtype).view(-1, PAGE, d)
    return Full(c, keys, c.rows.table), Full(c, values, c.v_full)


def _entries(c: CodedTables, table: Tensor, slot: int, head: int, at: Tensor) -> Tensor:
    first = c.rows.table_offset + slot * c.rows.table_seq + head * c.rows.table_head
    return table.flatten()[first + at].long()


@dataclass(slots=True)
class Places:
    """Where codes and constants of rows lie: int64 [..., d] each, in elements of the named size."""

    c: CodedTables
    memory: Tensor  # bytes
    word: Tensor  # 4 bytes: the code, or the low two of three bits
    shift: Tensor
    high: Tensor  # 2 bytes: the high one of three bits
    high_shift: Tensor
    scale: Tensor  # 2 bytes, float16
    zero: Tensor

    def codes(self) -> Tensor:
        c = self.c
        plane = 2 if c.bits == 3 else c.bits
        codes = (self.memory.view(torch.int32)[self.word].long() >> self.shift) & ((1 << plane) - 1)
        if c.bits == 3:
            codes |= ((self.memory.view(torch.int16)[self.high].long() >> self.high_shift) & 1) << 2
        return codes

    def load(self, device: torch.device | None = None) -> Tensor:
        """The rows float32 [..., d] that the codes mean, on `device`."""
        constants, codes = self.memory.view(torch.float16), self.codes()
        if device in (None, self.memory.device):
            return codes * constants[self.scale].float() + constants[self.zero].float()
        scale, zero = (constants[x[..., :: self.c.group]].to(device).float() for x in (self.scale, self.zero))
        codes = codes.to(torch.uint8).to(device).unflatten(-1, (-1, self.c.group))
        return (codes * scale[..., None] + zero[..., None]).flatten(-2)

    def store(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """All [..., d]. Codes share words, so what changes in each is added to it."""
        c, change = self.c, codes - self.codes()
        if c.bits == 3:
            high = (codes >> 2) - ((codes - change) >> 2)
            _add(self.memory.view(torch.int16), self.high, high << self.high_shift, 16)
            change = (codes & 3) - ((codes - change) & 3)
        _add(self.memory.view(torch.int32), self.word, change << self.shift, 32)
        constants = self.memory.view(torch.float16)
        constants[self.scale], constants[self.zero] = scale, zero

    def move(self, to: Places) -> None:
        """Copy codes and constants elsewhere."""
        constants = self.memory.view(torch.float16)
        to.store(self.codes(), constants[self.scale], constants[self.zero])


def places(c: CodedTables, slot: int, head: int, at: Tensor, keys: bool) -> Places:
    """Of rows `at` of one layer's one head."""
    unit = c.k_unit if keys else PAGE
    page = _entries(c, c.k_coded if keys else c.v_coded, slot, head, at // unit)
    return places_in(c, page, at % unit, keys)


def places_in(c: CodedTables, page: Tensor, at: Tensor, keys: bool) -> Places:
    """Of rows `at` of coded units `page` (int64 [...] both)."""
    memory, d = c.arena if keys else c.values, c.rows.head_dim
    device = memory.device
    page, at = page.to(device)[..., None], at.to(device)[..., None]
    channel = torch.arange(d, device=device)
    block, scale = channel // PAGE, channel // c.group * PAGE + at
    lane, position = channel % PAGE, at.expand(*at.shape[:-1], d)
    if keys:
        block, lane, position = block + at // PAGE * c.blocks, at % PAGE, (channel % PAGE).expand_as(position)
        scale = scale if c.by_token else at // c.group * d + channel
    unit, scales = (c.k_bytes, c.k_scales) if keys else (c.v_bytes, c.v_scales)
    first = page * unit + block * c.block_bytes
    plane = 2 if c.bits == 3 else c.bits
    per_word = 32 // plane
    constants = page * unit + unit - 4 * scales
    return Places(
        c,
        memory,
        word=first // 4 + position // per_word * PAGE + lane,
        shift=position % per_word * plane,
        high=(first + 64) // 2 + lane,
        high_shift=position,
        scale=constants // 2 + scale,
        zero=constants // 2 + scales + scale,
    )


def _add(flat: Tensor, at: Tensor, change: Tensor, width: int) -> None:
    wrapped = ((change + (1 << (width - 1))) & ((1 << width) - 1)) - (1 << (width - 1))
    flat.index_put_((at,), wrapped.to(flat.dtype), accumulate=True)


def _quantize(x: Tensor, bits: int, group: int, by_channel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int64 like x [n, d], and each one's scale and zero as float16."""
    groups = x.T.unflatten(1, (-1, group)) if by_channel else x.unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, zero = ((high - low) / (2**bits - 1)).half(), low.half()
    codes = torch.round((groups - zero.float()) / scale.float()).clamp(0, 2**bits - 1)
    codes = torch.where(scale > 0, codes, torch.zeros_like(codes)).long()
    found = (codes, scale.expand_as(groups), zero.expand_as(groups))
    codes, scale, zero = (f.flatten(1).T if by_channel else f.flatten(1) for f in found)
    return codes, scale, zero
