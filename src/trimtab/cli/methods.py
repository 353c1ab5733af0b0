"""`trimtab methods`: what there is behind each seam."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trimtab.cli import common
from trimtab.errors import ConfigError, did_you_mean


def run(
    seam: Annotated[
        str | None, typer.Argument(metavar="SEAM", help="Only this seam, e.g. cache.", show_default=False)
    ] = None,
    as_json: common.JsonOption = False,
) -> None:
    """List the methods behind each seam, or behind one.

    \b
    Examples:
      trimtab methods
      trimtab methods cache
    """
    from trimtab.registry import SEAMS

    if seam is not None and seam not in SEAMS:
        raise ConfigError(f"unknown seam {seam!r}.{did_you_mean(seam, SEAMS)}")
    chosen = [SEAMS[seam]] if seam is not None else list(SEAMS.values())
    if as_json:
        common.write_json(
            {r.seam: [{"name": m.name, **common.plain(m.card)} for m in _methods(r)] for r in chosen}
        )
        return

    from rich.table import Table

    for registry in chosen:
        table = Table(title=f"{registry.seam}: {registry.question}", title_justify="left", box=None)
        table.add_column("method", style="bold", no_wrap=True)
        table.add_column("what it does")
        table.add_column("paper", no_wrap=True)
        for method in _methods(registry):
            arxiv = f"arXiv {method.card.arxiv}" if method.card.arxiv else ""
            table.add_row(method.name, method.card.idea, arxiv)
        common.console().print(table)
    common.note("trimtab explain METHOD tells more about one")


def _methods(registry: Any) -> list[Any]:
    return [registry.get(name) for name in registry.names()]
