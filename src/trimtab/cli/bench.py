"""`trimtab bench`: how fast a plan runs here, next to what the machine allows."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli import common
from trimtab.cli.measuring import measure


def run(
    model: common.ModelArgument = None,
    plan: common.PlanOption = None,
    cache: common.CacheOption = None,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    threads: common.ThreadsOption = None,
    kv_memory: common.KvMemoryOption = None,
    backend: common.BackendOption = None,
    speed: Annotated[
        str,
        typer.Option(
            metavar="KEY=VALUE,...",
            help="Options of the speed task (see 'trimtab explain speed').",
            show_default=False,
        ),
    ] = "",
    seed: Annotated[int, typer.Option(metavar="N", help="Decides the prompts.")] = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Measure a plan's speed: first token, time per token, throughput, KV bytes, achieved bandwidth.

    \b
    Examples:
      trimtab bench
      trimtab bench ./my-model --cache kivi:bits=2 --threads 4
    """
    chosen = common.make_plan(
        plan,
        model,
        cache=cache,
        dtype=dtype,
        device=device,
        threads=threads,
        kv_memory=kv_memory,
        backend=backend,
    )
    task = f"speed:{speed}" if speed else "speed"
    measure([chosen], [task], seed=seed, out=None, as_json=as_json)
