"""A per-layer coded cache in plain torch: the oracle of native_per_layer.py and the path on other devices.

It decodes a sequence's whole past of the layer at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.paged import PAGE
from trimtab.kernels.per_layer import PerLayerTables
from trimtab.kernels.reference import TorchKernels


def prepare(kernels: TorchKernels) -> None:
    """Nothing to do; see native_per_layer.py."""


def write(kernels: TorchKernels, tables: PerLayerTables, k: Tensor, v: Tensor) -> None:
    """Store the new rows k, v [N, G, d] of every span in full."""
    for slot, begin, end in tables.spans.tolist():
        at = torch.arange(end - begin) + int(tables.start[slot])
        put_full(tables, slot, tables.layer, at, k[begin:end].flatten(1), v[begin:end].flatten(1))


def attend(kernels: TorchKernels, tables: PerLayerTables, q: Tensor) -> Tensor:
    """Attention [N, H, d] of rotated q [N, H, d] over coded rows and rows in full."""
    out = torch.zeros_like(q)
    groups, passed = tables.num_kv_heads, 0
    for slot, begin, end in tables.spans.tolist():
        n, base = end - begin, int(tables.start[slot])
        k, v = seen(tables, slot, base + n, begin)
        visible = torch.arange(base + n) < base + torch.arange(n)[:, None] + 1
        if tables.mask is not None:
            visible[:, base:] &= tables.mask[passed : passed + n * n].view(n, n).bool().cpu()
        passed += n * n
        query = q[begin:end].unflatten(1, (groups, -1)).float() * tables.scale
        scores = torch.einsum("ngxd,tgd->gxnt", query, k).masked_fill(~visible.to(q.device), -torch.inf)
        out[begin:end] = torch.einsum("gxnt,tgd->ngxd", scores.softmax(-1), v).flatten(1, 2).to(q.dtype)
    return out


def code(kernels: TorchKernels, tables: PerLayerTables, slot: int, rows: range) -> None:
    """Code rows of one sequence in all layers; those named in `kept_at` are copied in full."""
    codec, t = tables.codec, tables
    assert codec is not None
    at = torch.arange(rows.start, rows.stop)
    pages = range(rows.start // PAGE, -(-rows.stop // PAGE))
    for layer in range(t.num_layers):
        k, v = get_full(t, slot, layer, at)
        kept, page = kept_rows(t, slot, layer)
        skip = torch.isin(at, kept)
        new = (kept >= rows.start) & (kept < rows.stop)
        chosen = (kept[new] - rows.start).to(k.device)
        store = _elements(t).view(-1, 2, t.width)
        store[page[new].to(k.device)] = torch.stack([k[chosen], v[chosen]], 1)
        k, v = k.float(), v.float()
        if not t.folded:
            k = turned(t, layer, k)
        where = _coded_units(t, slot, layer, pages)
        block = t.arena.view(-1, codec.k_unit + codec.v_unit)
        units = block[where]
        units[int(rows.start % PAGE > 0) :] = 0
        k_units, v_units = (x.contiguous() for x in units.split((codec.k_unit, codec.v_unit), 1))
        codec.encode(layer, k_units, v_units, rows.start % PAGE, k, v, skip.to(k.device))
        block[where] = torch.cat([k_units, v_units], 1)


def hadamard(kernels: TorchKernels, x: Tensor, block: int) -> None:
    """Orthonormal Hadamard transforms of `block` consecutive numbers of x [..., n], in place."""
    x.copy_(transformed(x, block))


def transformed(x: Tensor, block: int) -> Tensor:
    """x [..., n] with every `block` (a power of two) consecutive numbers transformed; its own inverse."""
    shape, y = x.shape, x
    h = 1
    while h < block:
        pairs = y.reshape(*shape[:-1], -1, 2, h)
        y = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        h *= 2
    return y.reshape(shape) * block**-0.5


def turned(tables: PerLayerTables, layer: int, k: Tensor) -> Tensor:
    """Keys [n, width] in the codec's channels."""
    k = transformed(k, tables.hadamard)
    return k if tables.order is None else k[:, tables.order[layer].long().to(k.device)]


def unturned(tables: PerLayerTables, layer: int, k: Tensor) -> Tensor:
    """The inverse of `turned`."""
    if tables.order is not None:
        order = tables.order[layer].long().to(k.device)
        k = torch.empty_like(k).index_copy_(1, order, k)
    return transformed(k, tables.hadamard)


def seen(tables: PerLayerTables, slot: int, total: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """k (rotated) and v float32 [total, G, d] of the current layer as attention sees them; the first new row
    is number `first` of the step."""
    t, layer, done = tables, tables.layer, int(tables.done[slot])
    kept, page = kept_rows(t, slot, layer)
    k, v = (x.float() for x in get_full(t, slot, layer, torch.arange(done, total)))
    if done:
        assert t.codec is not None
        units = t.arena.view(-1, t.codec.k_unit + t.codec.v_unit)
        units = units[_coded_units(t, slot, layer, range(-(-done // PAGE)))]
        k_units, v_units = (x.contiguous() for x in units.split((t.codec.k_unit, t.codec.v_unit), 1))
        old_k = t.codec.decode_keys(layer, k_units).flatten(0, 1)[:done]
        old_v = t.codec.decode_values(layer, v_units).flatten(0, 1)[:done]
        if not t.folded:
            old_k = unturned(t, layer, old_k)
        full = _elements(t).view(-1, 2, t.width)[page.to(k.device)].float()
        old_k[kept.to(k.device)], old_v[kept.to(k.device)] = full.unbind(1)
        k, v = torch.cat([old_k, k]), torch.cat([old_v, v])
    if t.folded:
        k = unturned(t, layer, k)
    k, v = (x.unflatten(1, (t.num_kv_heads, t.head_dim)) for x in (k, v))
    if t.cos is not None and t.sin is not None:
        cos, sin = (x.transpose(1, 2).flatten(0, 1)[:total].to(k.device) for x in (t.cos, t.sin))
        if t.new_cos is not None and t.new_sin is not None:  # in a tree a row's place is not its position
            base = int(t.start[slot])
            new = slice(first, first + total - base)
            cos, sin = torch.cat([cos[:base], t.new_cos[new]]), torch.cat([sin[:base], t.new_sin[new]])
        TorchKernels().rotate(k, cos, sin)
    return k, v


def get_full(tables: PerLayerTables, slot: int, layer: int, at: Tensor) -> tuple[Tensor, Tensor]:
    """k, v [n, width] of rows `at` (int64 [n]) that are held in full."""
    keys, values, unit = _full_units(tables, slot, layer, at)
    lane = (at % PAGE).to(unit.device)
    return keys[unit, :, lane], values[unit, :, lane].flatten(1)


def put_full(tables: PerLayerTables, slot: int, layer: int, at: Tensor, k: Tensor, v: Tensor) -> None:
    keys, values, unit = _full_units(tables, slot, layer, at)
    lane = (at % PAGE).to(unit.device)
    keys[unit, :, lane] = k.to(keys.dtype)
    values[unit, :, lane] = v.unflatten(1, (tables.num_kv_heads, -1)).to(values.dtype)


def kept_rows(tables: PerLayerTables, slot: int, layer: int) -> tuple[Tensor, Tensor]:
    """Token numbers and pages, int64, of the rows of a layer that are kept in full."""
    count = int(tables.kept_count[slot, layer])
    return tables.kept_at[slot, layer, :count].long(), tables.kept_page[slot, layer, :count].long()


def _elements(tables: PerLayerTables) -> Tensor:
    return tables.arena.view(tables.rows_like.dtype)


def _full_units(tables: PerLayerTables, slot: int, layer: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All units' K [units, width, 16] and V [units, G, 16, d], and the unit of each row."""
    t = tables
    units = _elements(t).view(-1, 2, PAGE * t.width)
    which = t.full[slot].long()[at // PAGE] * t.num_layers + layer
    shape = (t.num_kv_heads, PAGE, t.head_dim)
    return (
        units[:, 0].unflatten(1, (t.width, PAGE)),
        units[:, 1].unflatten(1, shape),
        which.to(t.arena.device),
    )


def _coded_units(tables: PerLayerTables, slot: int, layer: int, pages: range) -> Tensor:
    blocks = tables.coded[slot, pages.start : pages.stop].long()
    return (blocks * tables.num_layers + layer).to(tables.arena.device)
