"""What `compare`, `eval` and `bench` share: run the measurement with a progress bar, show the report."""

from __future__ import annotations

from collections.abc import Sequence
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

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TimeElapsedColumn())
    with bars.Progress(*columns, console=common.console(stderr=True), transient=True) as bar:
        shown = bar.add_task("loading", total=1.0)

        def progress(at: Progress) -> None:
            bar.update(shown, completed=at.share, description=f"{at.task}: {at.plan}")

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
