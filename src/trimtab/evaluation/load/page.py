"""The measurement for people: a terminal table, and a page with the latency-versus-load pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.evaluation.load.measure import Measured, Settings
from trimtab.evaluation.load.picture import Curve, curves, sheet
from trimtab.evaluation.load.slo import MEANINGS
from trimtab.evaluation.load.summary import Quantiles, Summary
from trimtab.evaluation.report import format_number

if TYPE_CHECKING:
    from rich.table import Table

LATENCIES = (
    ("ttft", "Time to first token"),
    ("itl_token", "Inter-token latency, per token"),
    ("itl_chunk", "Inter-token latency, per chunk"),
    ("e2e", "End-to-end latency"),
)
RATE = "offered load, requests/s"


def name_of(summary: Summary) -> str:
    """A row's name: the offered rate, or the closed loop."""
    return f"{summary.rate:g}/s" if summary.rate is not None else f"{summary.clients} clients"


def counts(summary: Summary) -> list[tuple[str, str]]:
    """Heading and value of each figure that is not a latency."""
    failed = sum(summary.errors.values())
    return [
        ("sent", str(summary.sent)),
        ("done", str(summary.done)),
        ("errors", str(failed)),
        ("done/s", format_number(summary.achieved_rate)),
        ("tokens/s", format_number(summary.output_tokens_per_s)),
        ("goodput/s", format_number(summary.goodput)),
        ("good", format_number(summary.good / summary.sent if summary.sent else None, "share")),
    ]


def three(quantiles: Quantiles) -> str:
    """p50, p95 and p99 in milliseconds, or in seconds where they are long."""
    values = [quantiles.p50, quantiles.p95, quantiles.p99]
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    if max(known) >= 10:
        return " / ".join(f"{v:.1f}" for v in known) + " s"
    digits = 1 if max(known) < 0.1 else 0
    return " / ".join(f"{1e3 * v:.{digits}f}" for v in known) + " ms"


def tables(summaries: Sequence[Summary]) -> tuple[Table, Table]:
    """The terminal's tables: counts and rates, and latencies as p50 / p95 / p99."""
    from rich.table import Table

    rates, latencies = (Table(box=None, padding=(0, 2, 0, 0)) for _ in range(2))
    heads = [heading for heading, _ in counts(summaries[0])]
    for shown, headings in (
        (rates, [*heads, "sent late by", "client CPU"]),
        (latencies, ["TTFT", "per token", "per chunk", "end to end"]),
    ):
        shown.add_column("load")
        for heading in headings:
            shown.add_column(heading, justify="right", no_wrap=True)
    for s in summaries:
        values = [value for _, value in counts(s)]
        rates.add_row(name_of(s), *values, format_number(s.lag.p99, "s"), f"{s.client_cpu:.0%}")
        latencies.add_row(name_of(s), *(three(getattr(s, key)) for key, _ in LATENCIES))
    return rates, latencies


def pictures(summaries: Sequence[Summary], settings: Settings) -> list[tuple[str, str]]:
    """Heading and SVG of each picture over the open-loop rates; none where nothing was measured."""
    rates = sorted((s for s in summaries if s.rate is not None), key=lambda s: s.rate or 0.0)
    bounds = {"ttft": "ttft", "itl_chunk": "itl", "itl_token": "tpot", "e2e": "e2e"}
    found = []
    for key, heading in LATENCIES:
        lines = [
            Curve(q, [(s.rate or 0.0, getattr(getattr(s, key), q)) for s in rates])
            for q in ("p50", "p95", "p99")
        ]
        bound = settings.slo.bound(bounds[key])
        named = None if bound is None else ("SLO", bound)
        found.append((heading, curves(lines, RATE, heading.partition(",")[0].lower(), "s", named)))
    done = [
        Curve("done", [(s.rate or 0.0, s.achieved_rate) for s in rates]),
        Curve("good", [(s.rate or 0.0, s.goodput) for s in rates]),
    ]
    found.append(("Requests done, and done within the SLO", curves(done, RATE, "requests/s", "")))
    tokens = [Curve("tokens", [(s.rate or 0.0, s.output_tokens_per_s) for s in rates])]
    found.append(("Output tokens", curves(tokens, RATE, "tokens/s", "")))
    return [(heading, svg) for heading, svg in found if svg]


def render(measured: Measured, settings: Settings, provenance: dict[str, Any]) -> dict[str, bytes]:
    """`load.html` and `load.svg`."""
    from trimtab.evaluation.page import environment

    shown = pictures(measured.summaries, settings)
    title = f"{measured.served.name} under load"
    page = (
        environment()
        .get_template("load.html.j2")
        .render(
            title=title,
            facts=facts(measured, settings),
            slo=settings.slo,
            meanings=[f"{name}: {MEANINGS[name]}" for name, _ in settings.slo.bounds],
            pictures=shown,
            headings=[heading for heading, _ in counts(measured.summaries[0])] if measured.summaries else [],
            latencies=LATENCIES,
            lines=[
                (
                    name_of(s),
                    [value for _, value in counts(s)],
                    [three(getattr(s, key)) for key, _ in LATENCIES],
                    [three(s.lag), f"{s.client_cpu:.0%}", format_number(s.tokens_per_chunk)],
                )
                for s in measured.summaries
            ],
            failures=[(name_of(s), text, n) for s in measured.summaries for text, n in s.errors.items()],
            notes=notes(measured),
            provenance=provenance,
        )
    )
    return {"load.html": page.encode(), "load.svg": sheet(shown, title).encode()}


def facts(measured: Measured, settings: Settings) -> list[str]:
    """What was asked, in a few lines."""
    plan = (measured.served.record.get("trimtab") or {}).get("plan")
    mix = settings.mix
    lengths = (
        f"log-normal lengths, medians {mix.prompt:g} tokens in and {mix.output:g} out, "
        f"sigma {mix.prompt_sigma:g} and {mix.output_sigma:g}, "
        f"within a context of {measured.workload.context:,}"
    )
    texts = measured.workload.prompts
    if texts is not None:
        lengths = f"{len(texts) - measured.left_out} prompts of {settings.prompts and settings.prompts.name}"
    lines = [
        f"{measured.served.name}{f', plan {plan}' if plan else ''}; {measured.form.path}",
        f"Poisson arrivals, {settings.duration:g} s a rate after {settings.warmup:g} s of warm-up; "
        f"{lengths}; seed {settings.seed}",
    ]
    if measured.capacity is not None:
        lines.append(
            f"closed-loop capacity with {settings.clients} clients: "
            f"{format_number(measured.capacity)} requests/s"
        )
    return lines


def notes(measured: Measured) -> list[str]:
    """Sentences needed to read the numbers rightly."""
    found = [*measured.notes]
    if measured.left_out:
        found.append(f"{measured.left_out} prompts were left out: they do not fit into the context")
    found += [f"{name_of(s)}: {note}" for s in measured.summaries for note in s.notes]
    return found
