"""What `compare`, `eval` and `bench` share: run the measurement with a progress bar, show the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimtab.cli import common

if TYPE_CHECKING:
    from trimtab.evaluation.runner import Progress
    from trimtab.plan import Plan


def measure(
    plans: Sequence[Plan], tasks: Sequence[str], *, seed: int, out: Path | None, as_json: bool
) -> None:
    """Compare `plans` on `tasks`: bar on stderr, table (or JSON) on stdout, files in `out`."""
    from rich import progress as bars

    import trimtab

    console = common.console(stderr=True)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TimeElapsedColumn())
    bar = bars.Progress(*columns, console=console, transient=True)
    waits = any(plan.backend != "torch" for plan in plans) and _must_compile()
    shown = bar.add_task("compiling the C++ kernels, once" if waits else "loading", total=1.0)
    said: set[str] = set()

    def progress(at: Progress) -> None:
        text = f"{at.task} with {at.plan}"
        bar.update(shown, completed=at.share, description=text)
        if not console.is_terminal and text not in said:
            common.note(text)
            said.add(text)

    with bar if console.is_terminal else nullcontext():
        report = trimtab.compare(None, plans, tasks, out=out, seed=seed, progress=progress)
    if as_json:
        common.write_json(report.records())
    else:
        common.console().print(report.table())
    if out is not None:
        common.note(f"written: {out / 'report.html'} and {out / 'results.jsonl'}")
    for row in report.errors:
        common.note(f"failed: {row.task} with {row.plan}: {row.error}")
    if report.errors:
        raise typer.Exit(1)


def _must_compile() -> bool:
    """Whether a first run will wait for the compiler, which would look as if nothing happened."""
    from trimtab.kernels.build import CPP_TYPES, compiler, is_built

    return compiler() is not None and not any(is_built(dtype) for dtype in CPP_TYPES)
