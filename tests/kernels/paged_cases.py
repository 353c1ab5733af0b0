"""Random paged keys and values, and the dense truth about attention over them in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trimtab.kernels.paged import PAGE, PagedRows


@dataclass(frozen=True)
class Spec:
    """Rows held and rows new of each sequence; a list of lists gives every head a length of its own."""

    held: tuple[int | tuple[int, ...], ...] = (37,)
    new: tuple[int, ...] = (3,)
    heads: int = 4
    kv_heads: int = 2
    d: int = 32
    window: int = 0
    tree: bool = False
    causal: bool = True
    size: float = 1.0  # of the queries: large ones give peaked attention
    seed: int = 0

    @property
    def per_head(self) -> bool:
        return any(isinstance(h, tuple) for h in self.held)

    def length(self, sequence: int, head: int) -> int:
        held = self.held[sequence]
        return held[head] if isinstance(held, tuple) else held


@dataclass
class Case:
    spec: Spec
    rows: PagedRows
    q: Tensor  # float32 [N, H, d]
    k: Tensor  # float32 [N, G, d], new rows
    v: Tensor
    past: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def clone(self) -> Case:
        rows = replace(self.rows, arena=self.rows.arena.clone(), start=self.rows.start.clone())
        return replace(self, rows=rows)


def make_case(spec: Spec, dtype: torch.dtype) -> Case:
    g = torch.Generator().manual_seed(spec.seed)
    s, G, d, n = len(spec.held), spec.kv_heads, spec.d, sum(spec.new)
    lengths = [[spec.length(i, h) + spec.new[i] for h in range(G)] for i in range(s)]
    width = max(max(row) for row in lengths) // PAGE + 1
    table_heads = G if spec.per_head else 1
    # One entry of a shared table stands for G consecutive pages, one a head.
    entries = torch.randperm(s * table_heads * width, generator=g).to(torch.int32)
    pages = s * G * width
    # Whatever lies in pages that are not held must not matter.
    arena = torch.full((pages * 2 * PAGE * d,), float("nan"), dtype=dtype)
    starts = [[spec.length(i, h) for h in range(table_heads)] for i in range(s)]
    bounds = torch.tensor((0, *spec.new)).cumsum(0).tolist()
    spans = [[i, bounds[i], bounds[i + 1]] for i in range(s) if spec.new[i]]
    mask = None
    if spec.tree:
        squares = []
        for count in (c for c in spec.new if c):
            square = torch.rand(count, count, generator=g).tril() > 0.4
            squares.append((square | torch.eye(count, dtype=torch.bool)).flatten())
        mask = torch.cat(squares).to(torch.uint8)
    rows = PagedRows(
        arena=arena,
        table=entries.view(s, -1),
        start=torch.tensor(starts, dtype=torch.int32),
        spans=torch.tensor(spans, dtype=torch.int32).view(-1, 3),
        num_heads=spec.heads,
        num_kv_heads=G,
        head_dim=d,
        scale=d**-0.5,
        table_seq=table_heads * width,
        table_head=width if spec.per_head else 0,
        start_seq=table_heads,
        start_head=int(spec.per_head),
        page_mul=1 if spec.per_head else G,
        page_head=0 if spec.per_head else 1,
        window=spec.window,
        mask=mask,
        causal_new=spec.causal,
    )
    case = Case(
        spec,
        rows,
        q=torch.randn(n, spec.heads, d, generator=g) * spec.size,
        k=torch.randn(n, G, d, generator=g),
        v=torch.randn(n, G, d, generator=g),
    )
    view = arena.view(-1, 2, PAGE * d)
    for i in range(s):
        for h in range(G):
            count = spec.length(i, h)
            k = torch.randn(count, d, generator=g).to(dtype)
            v = torch.randn(count, d, generator=g).to(dtype)
            numbers = rows.pages(i, h, width)
            for t in range(count):
                page = view[numbers[t // PAGE]]
                page[0].view(d, PAGE)[:, t % PAGE] = k[t]
                page[1].view(PAGE, d)[t % PAGE] = v[t]
            case.past[i, h] = (k.double(), v.double())
    return case


def dense(case: Case, span: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(p [n, group, T], out [n, group, d], logsumexp [n, group]) of one span's one KV head, in float64."""
    spec, dtype = case.spec, case.rows.arena.dtype
    sequence, begin, end = case.rows.spans[span].tolist()
    n, group = end - begin, spec.heads // spec.kv_heads
    past_k, past_v = case.past[sequence, head]
    base = len(past_k)
    key = torch.cat([past_k, case.k[begin:end, head].to(dtype).double()])
    value = torch.cat([past_v, case.v[begin:end, head].to(dtype).double()])
    query = case.q[begin:end, head * group : (head + 1) * group].double()
    scores = torch.einsum("ngd,td->ngt", query, key) * spec.d**-0.5
    at, row = torch.arange(base + n)[None], torch.arange(n)[:, None]
    last = base + row if spec.causal else torch.full_like(row, base + n - 1)
    seen = at <= last
    if spec.window:
        seen &= at > last - spec.window
    if case.rows.mask is not None:
        skip = sum((e - b) ** 2 for _, b, e in case.rows.spans.tolist()[:span])
        seen[:, base:] &= case.rows.mask[skip : skip + n * n].view(n, n).bool()
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse[..., None].nan_to_num(neginf=0.0))
    return p, torch.einsum("ngt,td->ngd", p, value), lse


def dense_all(case: Case) -> tuple[Tensor, Tensor]:
    """(out [N, H, d], logsumexp [N, H]) of all spans; rows outside them are the empty segment."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    lse = torch.full(case.q.shape[:2], -torch.inf, dtype=torch.float64)
    group = case.spec.heads // case.spec.kv_heads
    for span, (_, begin, end) in enumerate(case.rows.spans.tolist()):
        for head in range(case.spec.kv_heads):
            at = slice(head * group, (head + 1) * group)
            _, out[begin:end, at], lse[begin:end, at] = dense(case, span, head)
    return out, lse
