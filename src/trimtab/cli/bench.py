"""`trimtab bench`: how fast a plan runs here; `trimtab bench serve`: how its server stands load."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from trimtab.cli import bench_serve, common
from trimtab.cli.measuring import measure

SPEED = "speed"  # the command that runs when no other is named


class BenchGroup(TyperGroup):
    """`bench [MODEL]` is the speed task; only a first word that names a command means something else.

    A model folder that is called like a command is written `./serve`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands or args[0] == SPEED:
            args = [SPEED, *args]
        return super().parse_args(ctx, args)


class SpeedCommand(TyperCommand):
    """Goes by the group's name, in usage lines and in errors."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        name, above = (parent.info_name, parent.parent) if parent is not None else (info_name, None)
        return super().make_context(name, args, parent=above, **extra)


group = typer.Typer(
    cls=BenchGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@group.callback()
def about() -> None:
    """Measure a plan's speed, alone or behind a server under load."""


@group.command(SPEED, cls=SpeedCommand)
def run(
    model: common.ModelArgument = None,
    plan: common.PlanOption = None,
    adapter: common.AdapterOption = None,
    weights: common.WeightsOption = None,
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

    How a plan's server stands load is measured by 'trimtab bench serve'.

    \b
    Examples:
      trimtab bench
      trimtab bench ./my-model --cache kivi:bits=2 --threads 4
      trimtab bench serve --rates 1,2,4,8
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
    task = f"speed:{speed}" if speed else "speed"
    measure([chosen], [task], seed=seed, out=None, as_json=as_json)


group.command("serve")(bench_serve.run)
