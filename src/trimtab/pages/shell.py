"""What the pages' templates are rendered with."""

from __future__ import annotations

import importlib.resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

STYLE = "style.css"


def environment(package: str) -> jinja2.Environment:
    """The templates in `package`'s folder `templates`, and `style.css` for all of them to include."""
    import jinja2

    def read(name: str) -> str:
        if name == STYLE:
            return (importlib.resources.files("trimtab.pages") / STYLE).read_text(encoding="utf-8")
        return (importlib.resources.files(package) / "templates" / name).read_text(encoding="utf-8")

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
