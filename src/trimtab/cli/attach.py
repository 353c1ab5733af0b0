"""`trimtab attach`: fit what a method needs for a model, into a folder of its own."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import common
from trimtab.errors import ConfigError, OutputError


def run(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="What to fit (see 'trimtab methods attachment').")
    ],
    model: common.ModelArgument = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Text, or .jsonl with a \"text\" a line (also .gz, .zst), to fit on; or 'shipped'.",
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where to put it; MODEL/attachments/METHOD is where it is looked for.",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A setting of the method (see 'trimtab explain METHOD'); may be repeated.",
            show_default=False,
        ),
    ] = None,
    device: common.DeviceOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an attachment at --out.")] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Fit what a method needs for a model: codebooks, channel orders, head scores. The model stays as it is.

    \b
    Examples:
      trimtab attach kvquant ./my-model --data notes.txt --out my-model/attachments/kvquant
      trimtab attach kvquant --data books.jsonl.zst --out kvquant --option sequences=8
      trimtab generate "Once upon a time" --cache kvquant:attachment=kvquant
    """
    from rich import progress as bars

    from trimtab.calibration.base import fit
    from trimtab.models.checkpoint import load
    from trimtab.registry import CALIBRATIONS

    pairs = [common.split_pair(text, "--option") for text in option or ()]
    options = CALIBRATIONS.build_options(method, dict(pairs))
    if not data:
        raise ConfigError("--data is missing: name a text file to fit on, or 'shipped'")
    if out is None:
        raise ConfigError("--out is missing: name the folder to make")
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty; choose another folder or add --overwrite")
    loaded = load(model, dtype="float32", device="cpu" if device in (None, "auto") else device)
    if data == "shipped":
        common.note("the shipped text is also what 'perplexity' scores: figures on it will flatter this")

    console = common.console(stderr=True)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TimeElapsedColumn())
    bar = bars.Progress(*columns, console=console, transient=True)
    shown = bar.add_task("reading", total=1.0)
    with bar if console.is_terminal else nullcontext():
        made = fit(
            method,
            loaded,
            data,
            options,
            lambda text, share: bar.update(shown, completed=share, description=text),
        )
    made.save(out, overwrite=overwrite)
    record = {"attachment": str(out), "kind": made.kind, "made": made.made, "measured": made.measured}
    if as_json:
        common.write_json(record)
    else:
        print(out)
        common.note(f"fitted on {made.made['tokens']:,} tokens of {made.made['data']}")
