"""`trimtab inspect`: look into a model. Each inspection is a command of this group."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import common

if TYPE_CHECKING:
    from trimtab.evaluation.inspection.heads import Ablation, HeadScores

group = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False
)


@group.callback()
def about() -> None:
    """Look into a model: what its parts do, measured and as a picture."""


@group.command()
def heads(
    model: common.ModelArgument = None,
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Text to hide needles in, as for 'trimtab attach'.")
    ] = "shipped",
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A setting of the needles, e.g. lengths=256+1024 (see 'trimtab explain retrieval_heads'); "
            "may be repeated.",
            show_default=False,
        ),
    ] = None,
    ablate: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Heads to leave out in the causal check; 0 = no check. Default: all retrieval heads.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[int, typer.Option(metavar="N", help="Sets of other heads to compare with.", min=1)] = 5,
    top: Annotated[int, typer.Option(metavar="N", help="Heads to list.", min=1)] = 10,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write heads.json, heads.html and the attachment retrieval_heads there.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left in --out.")
    ] = False,
    device: common.DeviceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Find the heads that retrieve, and what is lost without them.

    A head's score is the share of a needle that it looks at while the model puts the needle out.

    \b
    Examples:
      trimtab inspect heads
      trimtab inspect heads ./my-model --data notes.txt --out heads/
      trimtab generate "Once upon a time" --cache retrieval_heads:attachment=heads/retrieval_heads
    """
    from rich import progress as bars

    from trimtab.calibration.base import fit
    from trimtab.calibration.retrieval_heads import prompts
    from trimtab.errors import OutputError
    from trimtab.evaluation.files import check_writable
    from trimtab.evaluation.inspection.heads import HeadScores, check_ablation
    from trimtab.evaluation.inspection.heads import ablate as leave_out
    from trimtab.models.checkpoint import load
    from trimtab.registry import CALIBRATIONS

    pairs = [common.split_pair(text, "--option") for text in option or ()]
    options = CALIBRATIONS.build_options("retrieval_heads", dict(pairs))
    if out is not None:
        if any((out / name).exists() for name in ("heads.json", "retrieval_heads")) and not overwrite:
            raise OutputError(f"{out} holds an inspection already; choose another folder or add --overwrite")
        check_writable(out)
    loaded = load(model, dtype="float32", device="cpu" if device in (None, "auto") else device)
    if ablate:
        check_ablation(loaded.config, ablate)

    console = common.console(stderr=True)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TimeElapsedColumn())
    bar = bars.Progress(*columns, console=console, transient=True)
    shown = bar.add_task("reading", total=1.0)

    def progress(text: str, share: float) -> None:
        bar.update(shown, completed=share, description=text)

    with bar if console.is_terminal else nullcontext():
        made = fit("retrieval_heads", loaded, data, options, progress)
        found = HeadScores(made.tensors["trials"], made.measured["asked"])
        count = min(len(found.retrieval()), found.scores.numel() // 2) if ablate is None else ablate
        check = None
        if count:
            cases = prompts(loaded, data, options)
            check = leave_out(
                loaded,
                cases,
                found,
                count,
                draws,
                options.seed,
                lambda share: progress("without heads", share),
            )
    record = _record(found, check)
    if out is not None:
        made = dataclasses.replace(made, measured={**made.measured, "ablation": record["ablation"]})
        _write(out, made, found, check, record)
    if as_json:
        common.write_json(record)
    else:
        _show(found, check, loaded.config.num_kv_heads, top)
    if out is not None:
        common.note(f"written: {out / 'heads.html'}, {out / 'heads.json'} and {out / 'retrieval_heads'}")


def _record(found: HeadScores, check: Ablation | None) -> dict[str, Any]:
    """Scores trial by trial under "LAYER-HEAD", as the method's authors keep them, and what they come to."""
    names = [(f"{layer}-{head}", layer, head) for layer, head in found.ranked()]
    return {
        "heads": {name: found.trials[:, layer, head].tolist() for name, layer, head in names},
        "means": {name: float(found.scores[layer, head]) for name, layer, head in names},
        "needles": {"found": found.found, "asked": found.asked},
        "ablation": check
        and {
            "heads": [f"{layer}-{head}" for layer, head in check.heads],
            "whole": check.whole,
            "without": check.without,
            "without_others": check.without_others,
        },
    }


def _write(out: Path, made: Any, found: HeadScores, check: Ablation | None, record: dict[str, Any]) -> None:
    import json

    from trimtab.evaluation.files import write_all
    from trimtab.evaluation.inspection.picture import page

    lengths = ", ".join(map(str, made.options["lengths"]))
    facts = (
        f"needles at {made.options['depths']} depths in prompts of {lengths} tokens, "
        f"{made.options['samples']} of each, hidden in the text {made.made['data']}"
    )
    html = page(found, check, made.base.num_kv_heads, made.base.name, facts)
    write_all(
        out,
        {
            "heads.json": (json.dumps(common.plain(record), indent=1) + "\n").encode(),
            "heads.html": html.encode(),
        },
    )
    made.save(out / "retrieval_heads", overwrite=True)


def _show(found: HeadScores, check: Ablation | None, num_kv_heads: int, top: int) -> None:
    from rich.table import Table

    group_size = found.scores.shape[1] // num_kv_heads
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("layer-head", "KV head", "score"):
        table.add_column(heading, justify="right")
    for layer, head in found.ranked()[:top]:
        score = float(found.scores[layer, head])
        table.add_row(f"{layer}-{head}", f"{layer}-{head // group_size}", f"{score:.2f}")
    console = common.console()
    console.print(table)
    console.print(
        f"\n{len(found.retrieval())} of {found.scores.numel()} heads retrieve; "
        f"{found.found} of {found.asked} needles found"
    )
    if check is not None:
        others = ", ".join(f"{share:.0%}" for share in check.without_others)
        console.print(
            f"without the best {len(check.heads)}: {check.without:.0%} found; "
            f"without {len(check.heads)} others: {others}"
        )
