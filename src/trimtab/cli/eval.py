"""`trimtab eval`: one plan on some tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import common
from trimtab.cli.measuring import measure


def run(
    model: common.ModelArgument = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK[:KEY=VALUE,...]",
            help="What to measure; may be repeated (see 'trimtab methods task'). Default: perplexity.",
            show_default=False,
        ),
    ] = None,
    plan: common.PlanOption = None,
    adapter: common.AdapterOption = None,
    weights: common.WeightsOption = None,
    cache: common.CacheOption = None,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    threads: common.ThreadsOption = None,
    kv_memory: common.KvMemoryOption = None,
    backend: common.BackendOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write report.html and results.jsonl there.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides every drawn question.")] = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Measure one plan on tasks.

    \b
    Examples:
      trimtab eval --task needle
      trimtab eval ./my-model --task perplexity:text=notes.txt --cache kivi:bits=2
    """
    chosen = common.make_plan(
        plan,
        model,
        adapter=adapter,
        weights=weights,
        cache=cache,
        dtype=dtype,
        device=device,
        threads=threads,
        kv_memory=kv_memory,
        backend=backend,
    )
    measure([chosen], task or ["perplexity"], seed=seed, out=out, as_json=as_json)
