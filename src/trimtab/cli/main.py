"""`trimtab`: the command group, its error handling, and the entry point.

A command is a file in this folder with a function `run`, or with a typer app `group` of several commands;
the file's name is the command's. Files import nothing heavy at their top, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trimtab import __version__
from trimtab.errors import TrimtabError, did_you_mean

COMMANDS = (
    "generate",
    "chat",
    "serve",
    "compare",
    "bench",
    "eval",
    "methods",
    "explain",
    "info",
    "inspect",
    "attach",
    "train",
    "doctor",
)
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class CommandGroup(TyperGroup):
    """Imports a command's file when the command is used, and turns user mistakes into one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"trimtab.cli.{cmd_name}")
        if hasattr(module, "group"):
            return typer.main.get_command(module.group)
        single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        single.command(cmd_name, context_settings=SETTINGS)(module.run)
        return typer.main.get_command(single)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            ctx.fail(f"No such command {name!r}.{did_you_mean(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # A reader that has gone away shows only when the buffer is written out.
            sys.stdout.flush()
            return result
        except TrimtabError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Python writes the rest of the buffer at exit; give it somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None


app = typer.Typer(
    cls=CommandGroup,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"trimtab {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Bolt small parts onto a language model you already have, and measure what each one costs.

    Where a command takes MODEL, it is a folder, a Hugging Face hub id, or the name of a small model that
    ships with trimtab; without one, tiny is used.
    """


def main() -> None:
    """The console script."""
    typer.main.get_command(app)(prog_name="trimtab")
