"""`trimtab bench serve`: requests at several rates against a server, its latencies, and their picture."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import common

if TYPE_CHECKING:
    from trimtab.evaluation.load.measure import Measured, Settings
    from trimtab.plan import Plan


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
    serve: Annotated[
        str,
        typer.Option(
            "--serve",
            metavar="WORDS",
            help="Further options of 'trimtab serve', e.g. '--stream-interval 0'.",
            show_default=False,
        ),
    ] = "",
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure a running OpenAI-compatible server instead of starting one.",
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Key for --url. Better: the variable TRIMTAB_API_KEY.",
            envvar="TRIMTAB_API_KEY",
            show_default=False,
            show_envvar=False,
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Model to ask for. Default: the first served.", show_default=False),
    ] = None,
    rates: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Requests a second, or auto: 0.25 to 1.1 of what --clients get in a closed loop.",
        ),
    ] = "auto",
    clients: Annotated[int, typer.Option(metavar="N", help="Clients of the closed loop.", min=1)] = 32,
    duration: Annotated[str, typer.Option(metavar="TIME", help="Measured time at each rate.")] = "30s",
    warmup: Annotated[str, typer.Option(metavar="TIME", help="Load before it that does not count.")] = "5s",
    timeout: Annotated[
        str, typer.Option(metavar="TIME", help="A request that takes longer has failed.")
    ] = "2m",
    slo: Annotated[
        str,
        typer.Option(
            metavar="NAME=TIME,...",
            help="What a good request keeps: ttft, tpot (mean per token), itl (its p99 gap), e2e.",
        ),
    ] = "ttft=200ms,itl=50ms",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSONL with 'prompt' or 'turns' in each line. Default: passages of drawn lengths.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(
            metavar="KEY=VALUE,...",
            help="Length mix: medians prompt=69,output=225; prompt_sigma=1.3,output_sigma=0.9.",
            show_default=False,
        ),
    ] = "",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--completion",
            help="Endpoint. Default: chat for --prompts if the model can, else completion.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="X", help="0: greedy.", min=0.0)] = 0.0,
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Answers of just the drawn length. Default: only without --prompts.",
            show_default=False,
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Send OpenAI's own fields only (no ignore_eos, no return_token_ids)."),
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Context in tokens, if the server does not tell.", min=64, show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides arrivals, prompts and lengths.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write results.jsonl, load.html and load.svg there.", show_default=False
        ),
    ] = None,
    as_json: common.JsonOption = False,
) -> None:
    """Measure a server under load: latencies at several rates of arrivals, and goodput within a bound.

    Requests arrive at random times (Poisson) whether or not earlier ones are done, and latencies count from
    those times. Without --url the server is started for it, with the plan's options.

    \b
    Examples:
      trimtab bench serve
      trimtab bench serve --cache kivi:bits=2 --rates 1,2,4,8 --out load/
      trimtab bench serve --url http://127.0.0.1:8000 --prompts question.jsonl --slo ttft=500ms
    """
    from trimtab.errors import ConfigError
    from trimtab.evaluation.files import check_writable
    from trimtab.evaluation.load.lengths import LengthMix
    from trimtab.evaluation.load.measure import Settings, parse_rates
    from trimtab.evaluation.load.slo import Slo, parse_duration

    given = {
        "adapter": adapter,
        "weights": weights,
        "cache": cache,
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "kv_memory": kv_memory,
        "backend": backend,
    }
    chosen = common.make_plan(plan, model, **given)
    if url is not None:
        own = {"MODEL": model, "--plan": plan, "--serve": serve or None}
        own |= {f"--{name.replace('_', '-')}": value for name, value in given.items()}
        mine = [name for name, value in own.items() if value is not None]
        if mine:
            raise ConfigError(
                f"--url measures a server that runs already, so {mine[0]} has no effect; leave it out"
            )
    settings = Settings(
        rates=parse_rates(rates),
        duration=parse_duration(duration, "--duration"),
        warmup=parse_duration(warmup, "--warmup"),
        slo=Slo.parse(slo),
        mix=LengthMix.parse(lengths),
        prompts=prompts,
        clients=clients,
        chat=chat,
        temperature=temperature,
        ignore_eos=ignore_eos,
        plain=plain,
        context=context,
        seed=seed,
    )
    limit = parse_duration(timeout, "--timeout")
    for name, seconds in (("--duration", settings.duration), ("--timeout", limit)):
        if seconds <= 0:
            raise ConfigError(f"{name} is 0; give it more than zero")
    if plain and ignore_eos:
        raise ConfigError("--plain sends no ignore_eos; leave out one of --plain and --ignore-eos")
    if out is not None:
        check_writable(out)
    if prompts is not None:
        from trimtab.evaluation.load.prompts import read_prompts

        read_prompts(prompts)  # mistakes in it must show before a server is started
    with nullcontext(url) if url is not None else _own_server(chosen, serve) as address:
        measured = _measure(address, api_key if url is not None else None, limit, settings, model_name)
    _report(measured, settings, out, as_json)


@contextmanager
def _own_server(plan: Plan, words: str) -> Iterator[str]:
    from trimtab.evaluation.load.server import ServerProcess

    try:
        more = shlex.split(words)
    except ValueError as error:
        from trimtab.errors import ConfigError

        raise ConfigError(f"--serve is {words!r}, which cannot be split into words: {error}") from None
    first = [] if plan.model is None else [plan.model]
    common.note("starting the server")
    with ServerProcess([*first, "--plan", str(plan.with_(model=None)), *more]) as server:
        yield server.url


def _measure(
    url: str, api_key: str | None, timeout: float, settings: Settings, model_name: str | None
) -> Measured:
    from trimtab.evaluation.load.client import Client
    from trimtab.evaluation.load.measure import measure
    from trimtab.evaluation.load.run import run_async

    async def work(progress: Callable[[str, float], None]) -> Measured:
        client = Client(url, api_key, timeout)
        try:
            return await measure(client, settings, model_name, progress)
        finally:
            await client.close()

    with _bar() as progress:
        return run_async(work(progress))


@contextmanager
def _bar() -> Iterator[Callable[[str, float], None]]:
    """A line on stderr for each load; on a terminal a bar that moves a few times a second at most."""
    from time import monotonic

    from rich import progress as bars

    console = common.console(stderr=True)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TimeElapsedColumn())
    # The client shares the machine with the server: no thread that redraws ten times a second.
    bar = bars.Progress(*columns, console=console, transient=True, auto_refresh=False)
    shown = bar.add_task("looking at the server", total=1.0)
    last: dict[str, Any] = {"what": "", "at": 0.0}

    def progress(what: str, share: float) -> None:
        if what == last["what"] and monotonic() - last["at"] < 0.5:
            return
        if what != last["what"] and not console.is_terminal:
            common.note(what)
        last.update(what=what, at=monotonic())
        if console.is_terminal:
            bar.update(shown, completed=share, description=what)
            bar.refresh()

    with bar if console.is_terminal else nullcontext():
        yield progress


def _report(measured: Measured, settings: Settings, out: Path | None, as_json: bool) -> None:
    from trimtab.evaluation.load.measure import describe, to_jsonl
    from trimtab.evaluation.load.page import facts, notes, render, tables
    from trimtab.evaluation.provenance import provenance

    origin = provenance(settings.seed)
    described = describe(measured, settings)
    records = [common.plain(summary) | {"settings": described} | origin for summary in measured.summaries]
    if as_json:
        common.write_json(records)
    else:
        console = common.console()
        rates, latencies = tables(measured.summaries)
        console.print(rates)
        console.print()
        console.print(latencies)
        common.note("latencies: p50 / p95 / p99, from the scheduled arrival; good: done within the SLO")
    for line in [*facts(measured, settings), f"SLO: {settings.slo}", *notes(measured)]:
        common.note(line)
    for summary in measured.summaries:
        for text, count in summary.errors.items():
            common.note(f"failed: {count} x {text}")
    if out is not None:
        from trimtab.evaluation.files import write_all

        files = {"results.jsonl": to_jsonl([common.plain(record) for record in records]).encode()}
        write_all(out, files | render(measured, settings, origin))
        common.note(f"written: {out / 'results.jsonl'}, {out / 'load.html'} and {out / 'load.svg'}")
    if any(summary.errors for summary in measured.summaries):
        raise typer.Exit(1)
