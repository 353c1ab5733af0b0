"""`trimtab explain`: one method's card and options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Annotated, Any

import typer

from trimtab.cli import common
from trimtab.errors import ConfigError, did_you_mean

HEADINGS = {
    "idea": "Idea",
    "exactness": "Exact or not",
    "cost": "Cost",
    "needs": "Needs",
    "avoid_when": "Not when",
    "measured": "Measured",
    "paper": "Paper",
    "arxiv": "arXiv",
}


def run(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method's name, e.g. kivi.")],
    as_json: common.JsonOption = False,
) -> None:
    """Explain a method: its idea, what is exact, what it costs, when not to use it, and its options.

    \b
    Examples:
      trimtab explain kivi
      trimtab explain needle
    """
    found = _find(method)
    if as_json:
        common.write_json([_record(item) for item in found])
        return
    for item in found:
        _show(item)


def _find(name: str) -> list[Any]:
    """The methods of that name, of whichever seams."""
    from trimtab.registry import SEAMS

    holders = [registry for registry in SEAMS.values() if name in registry.names()]
    if not holders:
        known = [known for registry in SEAMS.values() for known in registry.names()]
        raise ConfigError(f"unknown method {name!r}.{did_you_mean(name, known)}")
    return [registry.get(name) for registry in holders]


def option_rows(options: type) -> list[dict[str, Any]]:
    """Name, type, default and help of each option of a method."""
    hints = typing.get_type_hints(options)
    told = _documented(options)
    rows = []
    for field in dataclasses.fields(options):
        if not field.init:
            continue
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default is dataclasses.MISSING
        rows.append(
            {
                "name": field.name,
                "type": _type_name(hints[field.name]),
                "default": None if required else default,
                "required": required,
                "help": field.metadata.get("help") or told.get(field.name, ""),
            }
        )
    return rows


def _documented(options: type) -> dict[str, str]:
    """What the docstring says of each field, in lines `name: text` with indented continuation lines."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (inspect.getdoc(options) or "").splitlines():
        head = re.match(r"(\s*)(\w+(?:, \w+)*): +(\S.*)", line)
        if head:
            names = head[2].split(", ")
            found |= dict.fromkeys(names, head[3])
        elif not line.strip():
            names = []
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    if isinstance(hint, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(hint)).replace("NoneType", "none")
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _record(method: Any) -> dict[str, Any]:
    return {
        "name": method.name,
        "seam": method.seam,
        "card": method.card,
        "options": option_rows(method.options),
    }


def _show(method: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    from trimtab.plan import value_text

    console = common.console()
    kind = "task" if method.seam == "task" else f"{method.seam} method"
    console.print(f"[bold]{escape(method.card.title)}[/] ({kind} [bold]{escape(method.name)}[/])\n")
    card = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    card.add_column(style="bold", no_wrap=True)
    card.add_column()
    for key, heading in HEADINGS.items():
        text = getattr(method.card, key)
        if text:
            card.add_row(heading, escape(text))
    console.print(card)
    rows = option_rows(method.options)
    if not rows:
        console.print("\nIt has no options.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("option", "default", "type", "meaning"):
        table.add_column(heading, no_wrap=heading != "meaning")
    for row in rows:
        default = "(required)" if row["required"] else value_text(row["default"])
        table.add_row(row["name"], escape(default), escape(row["type"]), escape(row["help"]))
    console.print()
    console.print(table)
    optional = [row for row in rows if not row["required"]]
    example = ",".join(f"{row['name']}={value_text(row['default'])}" for row in optional[:2])
    if method.seam == "cache" and example:
        call = f'trimtab generate --cache {method.name}:{example} "Once upon a time"'
        console.print(f"\n{escape(call)}")
