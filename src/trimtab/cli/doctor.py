"""`trimtab doctor`: what this machine has and how fast it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trimtab.cli import common


def run(
    threads: common.ThreadsOption = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure memory and matmul speed (a few seconds).")
    ] = True,
    as_json: common.JsonOption = False,
) -> None:
    """Report versions, processor, compiler and kernels, and measure what bounds a model's speed.

    Reading weights and cache bounds the speed of one stream (read bandwidth); arithmetic bounds prompts
    and large batches (matmul rate).
    """
    from trimtab import hardware
    from trimtab.kernels.build import CPP_TYPES, is_built

    found: dict[str, Any] = dict(hardware.describe())
    found["kernels"] = {
        dtype: "built" if is_built(dtype) else "built on first use" if found["compiler"] else "no compiler"
        for dtype in CPP_TYPES
    }
    if measure:
        common.note("measuring")
        found["read_bandwidth_gb_per_s"] = hardware.read_bandwidth(threads)
        for dtype in ("float32", "bfloat16"):
            found[f"matmul_{dtype}_gflop_per_s"] = hardware.matmul_rate(dtype, threads)
    if as_json:
        common.write_json(found)
        return

    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for key, value in _flat(found):
        table.add_row(key.replace("_", " "), escape(_show(value)))
    common.console().print(table)


def _flat(values: dict[str, Any], head: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{head}{key} ")
        else:
            rows.append((f"{head}{key}", value))
    return rows


def _show(value: Any) -> str:
    if value is None:
        return "none found"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)
