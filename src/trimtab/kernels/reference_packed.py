"""KIVI's storage and attention in plain torch, bit for bit the same codes as the C++ kernels.

It unpacks a sequence's whole past at every call: an oracle and a fallback, not a fast path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.packed import PackedRows
from trimtab.kernels.paged import PAGE


def write_packed(p: PackedRows, k: Tensor, v: Tensor) -> None:
    """Store the new rows k, v [N, G, d] of every span unpacked."""
    keys, values = _full_units(p)
    for slot, begin, end in p.rows.spans.tolist():
        at = torch.arange(end - begin) + p.rows.held(slot, 0)
        inside = (at % PAGE).to(keys.device)
        for head in range(p.rows.num_kv_heads):
            keys[_units(p, p.k_full, slot, at // PAGE, head), :, inside] = k[begin:end, head].to(keys.dtype)
            values[_units(p, p.v_full, slot, at // PAGE, head), inside] = v[begin:end, head].to(values.dtype)


def pack(p: PackedRows, slot: int, groups: range, value_rows: range) -> None:
    """Pack key groups and value rows of one sequence, in all layers and heads."""
    keys, values = _full_units(p)
    n, d, bits = p.group, p.rows.head_dim, p.bits
    layer = p.layer
    for number in range(p.num_layers):
        p.layer = number
        for head in range(p.rows.num_kv_heads):
            for i in groups:
                blocks = torch.arange(i * n // PAGE, (i + 1) * n // PAGE)
                x = keys[_units(p, p.k_full, slot, blocks, head)]  # [n / 16, d, 16]
                x = x.permute(1, 0, 2).reshape(d, n).float()
                codes, scale, zero = _quantize(x, bits)
                unit = _bytes(p, p.k_packed, slot, i, head, p.k_unit)
                words = _to_words(codes.view(d, n // PAGE, PAGE).permute(1, 0, 2), p.per_word, bits)
                _store(unit, words, torch.stack([scale, zero]))
            for i in value_rows:
                row = values[_units(p, p.v_full, slot, torch.tensor([i // PAGE]), head)][0, i % PAGE].float()
                codes, scale, zero = _quantize(row.view(-1, n), bits)
                unit = _bytes(p, p.v_packed, slot, i // PAGE, head, p.v_unit)
                count = d // PAGE * p.v_words * PAGE * 4
                words = unit[:count].view(torch.int32).view(d // PAGE, p.v_words, PAGE)
                if i % PAGE == 0:
                    words.zero_()
                shift = i % PAGE % p.per_word * bits
                words[:, i % PAGE // p.per_word] |= codes.view(-1, PAGE).to(torch.int32) << shift
                constants = unit[count:].view(torch.float16).view(2, PAGE, d // n)
                constants[:, i % PAGE] = torch.stack([scale, zero])
    p.layer = layer


def attend_packed(p: PackedRows, q: Tensor) -> Tensor:
    """Attention [N, H, d] of rotated q [N, H, d] over the packed and the unpacked rows."""
    rows, out = p.rows, torch.zeros_like(q)
    group = rows.num_heads // rows.num_kv_heads
    for index, (slot, begin, end) in enumerate(rows.spans.tolist()):
        base, n = rows.held(slot, 0), end - begin
        seen = torch.arange(base + n)[None] < base + torch.arange(n)[:, None] + 1
        if rows.mask is not None:
            skip = sum((e - b) ** 2 for _, b, e in rows.spans.tolist()[:index])
            seen[:, base:] &= rows.mask[skip : skip + n * n].view(n, n).bool()
        for head in range(rows.num_kv_heads):
            key, value = unpacked(p, slot, head, base + n)
            heads = slice(head * group, (head + 1) * group)
            scores = torch.einsum("ngd,td->ngt", q[begin:end, heads].float() * rows.scale, key)
            scores = scores.masked_fill(~seen.to(q.device)[:, None], -torch.inf)
            out[begin:end, heads] = torch.einsum("ngt,td->ngd", scores.softmax(-1), value).to(q.dtype)
    return out


def unpacked(p: PackedRows, slot: int, head: int, total: int) -> tuple[Tensor, Tensor]:
    """k and v float32 [total, d] of one layer's one head as attention sees them."""
    n, d = p.group, p.rows.head_dim
    keys, values = _full_units(p)
    k_done, v_done = int(p.k_done[slot]), int(p.v_done[slot])
    k_parts, v_parts = [], []
    for i in range(k_done // n):
        unit = _bytes(p, p.k_packed, slot, i, head, p.k_unit)
        count = n // PAGE * p.k_words * PAGE * 4
        words = unit[:count].view(torch.int32).view(n // PAGE, p.k_words, PAGE)
        codes = _from_words(words, p.per_word, p.bits)[:, :d]  # [n / 16, d, 16]
        scale, zero = unit[count:].view(torch.float16).view(2, d).float()
        k_parts.append((codes * scale[:, None] + zero[:, None]).permute(0, 2, 1).reshape(n, d))
    pages = torch.arange(k_done // PAGE, -(-total // PAGE))
    rest = keys[_units(p, p.k_full, slot, pages, head)].float().permute(0, 2, 1).reshape(-1, d)
    k_parts.append(rest[: total - k_done])
    for i in range(-(-v_done // PAGE)):
        unit = _bytes(p, p.v_packed, slot, i, head, p.v_unit)
        count = d // PAGE * p.v_words * PAGE * 4
        words = unit[:count].view(torch.int32).view(d // PAGE, p.v_words, PAGE)
        codes = _from_words(words, p.per_word, p.bits)[:, :PAGE]  # [d / 16, 16 tokens, 16]
        scale, zero = unit[count:].view(torch.float16).view(2, PAGE, d // n).float().repeat_interleave(n, 2)
        v_parts.append(codes.permute(1, 0, 2).reshape(PAGE, d) * scale + zero)
    packed = torch.cat(v_parts)[:v_done] if v_parts else torch.empty(0, d, device=keys.device)
    pages = torch.arange(v_done // PAGE, -(-total // PAGE))
    rest = values[_units(p, p.v_full, slot, pages, head)].float().reshape(-1, d)
    return torch.cat(k_parts), torch.cat([packed, rest[v_done % PAGE : v_done % PAGE + total - v_done]])


def _quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes like x, and scale and zero float16 of each row of the last axis."""
    low, high = x.amin(-1), x.amax(-1)
    scale, zero = ((high - low) / (2**bits - 1)).half(), low.half()
    s, z = scale.float()[..., None], zero.float()[..., None]
    codes = torch.round((x - z) / s).clamp(0, 2**bits - 1)
    return torch.where(s > 0, codes, torch.zeros_like(codes)).long(), scale, zero


def _to_words(codes: Tensor, per_word: int, bits: int) -> Tensor:
    """int32 [..., words, 16] from codes [..., n, 16]."""
    n = codes.shape[-2]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -n % per_word))
    parts = (
        padded.unflatten(-2, (-1, per_word)) << (torch.arange(per_word, device=codes.device) * bits)[:, None]
    )
    return parts.sum(-2).to(torch.int64).bitwise_and(0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def _from_words(words: Tensor, per_word: int, bits: int) -> Tensor:
    """Codes float32 [..., words * per_word, 16]."""
    wide = words.to(torch.int64).bitwise_and(0xFFFFFFFF)[..., None, :]
    shifts = (torch.arange(per_word, device=words.device) * bits)[:, None]
    return ((wide >> shifts) & (2**bits - 1)).flatten(-3, -2).float()


def _store(unit: Tensor, words: Tensor, constants: Tensor) -> None:
    count = words.numel() * 4
    unit[:count] = words.contiguous().view(torch.uint8).flatten()
    unit[count:] = constants.contiguous().view(torch.uint8).flatten()


def _full_units(p: PackedRows) -> tuple[Tensor, Tensor]:
    """All units of unpacked K [units, d, 16] and V [units, 16, d]."""
    d = p.rows.head_dim
    flat = p.rows.arena.view(-1, PAGE * d)
    return flat.unflatten(-1, (d, PAGE)), flat.unflatten(-1, (PAGE, d))


def _units(p: PackedRows, table: Tensor, slot: int, blocks: Tensor, head: int) -> Tensor:
    """Unit numbers of one layer's one head in the given blocks of a table."""
    at = table[slot].long()[blocks] * p.n_units + p.layer * p.rows.num_kv_heads + head
    return at.to(p.arena.device)


def _bytes(p: PackedRows, table: Tensor, slot: int, block: int, head: int, unit_bytes: int) -> Tensor:
    first = (int(table[slot, block]) * p.n_units + p.layer * p.rows.num_kv_heads + head) * unit_bytes
    return p.arena[first : first + unit_bytes]
