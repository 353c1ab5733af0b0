"""What several commands share: their options, the plan these make, and how results are written.

Results go to stdout, everything for people besides them to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from trimtab.engine.engine import Engine
    from trimtab.models.tokenizer import Tokenizer
    from trimtab.plan import Plan

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Folder, hub id, or a shipped model's name. Default: tiny.", show_default=False
    ),
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="PLAN",
        help="YAML file, or a string such as 'cache=kivi:bits=2 dtype=bfloat16'. Other options go first.",
        show_default=False,
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="LoRA adapter for the model, of 'trimtab train' or of PEFT.",
        show_default=False,
    ),
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="METHOD[:KEY=VALUE,...]",
        help="KV-cache policy, e.g. kivi:bits=2 (see 'trimtab methods cache'). Default: full.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16, float16, or auto: as the checkpoint is stored (default).",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="auto (default), cpu, cuda or cuda:N.", show_default=False
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="CPU threads. Default: all cores.", show_default=False),
]
KvMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--kv-memory",
        metavar="SIZE",
        help="Bound on KV-cache memory, e.g. 512MiB or 2GB.",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="METHOD",
        help="How matrices are stored: plain (default), or int8 (see 'trimtab methods weights').",
        show_default=False,
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="native (C++ kernels for CPUs), torch, or auto (default).",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write the result as one line of JSON to stdout.")]


def make_plan(plan: str | None, model: str | None = None, **settings: Any) -> Plan:
    """The plan that `--plan` names, with MODEL and the options that were given put over it."""
    from trimtab.plan import Plan

    base = Plan() if plan is None else Plan.of(plan)
    given = {key: value for key, value in {"model": model, **settings}.items() if value is not None}
    return base.with_(**given)


def make_engine(plan: Plan) -> Engine:
    """The engine of a plan, for commands where the first token should come soon.

    Kernels that are not there yet are compiled beside it, for the next run.
    """
    from trimtab import Engine

    if plan.model is not None:
        note(f"loading {plan.model}")
    engine = Engine(plan=plan, wait_for_kernels=False)
    if plan.backend == "auto" and engine.backend == "torch":
        from trimtab.kernels.build import compiler
        from trimtab.kernels.native import unsupported

        if compiler() and not unsupported(engine.model.config, engine.model.dtype, engine.model.device):
            note("the C++ kernels are being compiled; until they are ready, plain torch serves")
    return engine


def tokenizer_of(engine: Engine) -> Tokenizer:
    """The engine's tokenizer, which a chat needs."""
    tokenizer = engine.model.tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{engine.model.path} has no tokenizer, which a chat needs")
    return tokenizer


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def console(stderr: bool = False) -> Console:
    """A rich console that does not squeeze tables to 80 columns when it is not a terminal."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            # Called while the error is handled; the command group deals with it for all commands.
            raise

    found = Plain(stderr=stderr, highlight=False)
    return found if found.is_terminal else Plain(stderr=stderr, highlight=False, width=140)


def write_json(record: Any) -> None:
    """One line of valid JSON on stdout: unknown and infinite numbers become null."""
    print(json.dumps(plain(record), ensure_ascii=False, allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """`value` as JSON knows it: dataclasses and mappings as objects, sequences as lists."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def read_stdin() -> str:
    """All of stdin, without the newline that ends it."""
    return sys.stdin.read().removesuffix("\n")


def is_model_folder(text: str) -> bool:
    """Whether a word names a folder with a model in it."""
    try:
        return (Path(text) / "config.json").is_file()
    except (OSError, ValueError):
        return False


def is_file(text: str) -> bool:
    """Whether a word names a file."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def is_piped() -> bool:
    """Whether stdin is a file or a pipe rather than a keyboard."""
    return sys.stdin is not None and not sys.stdin.isatty()


def split_pair(text: str, what: str) -> tuple[str, str]:
    """`"KEY=VALUE"` as its two halves."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{what} is {text!r}; write KEY=VALUE")
    return key, value
