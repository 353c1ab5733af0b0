"""`trimtab compare`: plans x tasks, side by side, as a table and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli import common
from trimtab.cli.measuring import measure

if TYPE_CHECKING:
    from trimtab.plan import Plan

PLANS = ("full", "kivi:bits=4", "kivi:bits=2")
TASKS = ("perplexity", "needle", "skills", "speed")


def run(
    model: common.ModelArgument = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLAN",
            help="A plan string or YAML file; repeat to compare several. The first is the baseline. "
            f"Default: {', '.join(PLANS)}.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK[:KEY=VALUE,...]",
            help=f"What to measure; may be repeated. Default: {', '.join(TASKS)}.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write report.html and results.jsonl there.", show_default=False),
    ] = None,
    weights: common.WeightsOption = None,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    threads: common.ThreadsOption = None,
    kv_memory: common.KvMemoryOption = None,
    backend: common.BackendOption = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides every drawn question.")] = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Compare plans on quality, speed and memory, measured here and now.

    \b
    Examples:
      trimtab compare
      trimtab compare ./my-model --plan full --plan kivi:bits=2 --task needle --out report/
      trimtab compare --plan full --plan best.yaml --task perplexity:text=notes.txt
    """
    settings = {
        "weights": weights,
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "kv_memory": kv_memory,
        "backend": backend,
    }
    plans: list[Plan] = [common.make_plan(text, model, **settings) for text in plan or PLANS]
    measure(plans, task or TASKS, seed=seed, out=out, as_json=as_json)
