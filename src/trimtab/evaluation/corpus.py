"""Where evaluation text comes from."""

from __future__ import annotations

import importlib.resources
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.models.tokenizer import Tokenizer

WIKITEXT_PLACES = ("wikitext-2/test.txt", "wikitext-2/wiki.test.tokens", "test.txt", "wiki.test.tokens")


@cache
def shipped_text() -> str:
    """About 200 kB of public-domain prose the shipped model was not trained on (see `data/README.md`)."""
    folder = importlib.resources.files("trimtab.evaluation") / "data"
    return (folder / "heldout.txt").read_text(encoding="utf-8")


def load_text(text: str = "shipped", folder: str = "data") -> str:
    """The evaluation text called `text`.

    `shipped`, `wikitext2` (looked for below `folder`), or the path of a UTF-8 text file.
    Raises ConfigError for a text that is missing, empty or not UTF-8.
    """
    if text == "shipped":
        return shipped_text()
    if text == "wikitext2":
        found = [p for p in (Path(folder) / place for place in WIKITEXT_PLACES) if p.is_file()]
        if not found:
            raise ConfigError(
                f"text 'wikitext2' needs the file {WIKITEXT_PLACES[0]!r} below the folder {folder!r}; "
                "name the folder that holds it with folder=PATH"
            )
        return _read(found[0])
    path = Path(text).expanduser()
    if not path.is_file():
        raise ConfigError(f"text {text!r} is neither 'shipped', 'wikitext2' nor an existing text file")
    return _read(path)


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"text file {str(path)!r} is not UTF-8; convert it first") from None
    except OSError as error:
        raise ConfigError(f"text file {str(path)!r} cannot be read: {error.strerror}") from None
    if not content.strip():
        raise ConfigError(f"text file {str(path)!r} is empty")
    return content


def characters_per_token(tokenizer: Tokenizer, text: str) -> float:
    """Measured on the beginning of `text`."""
    sample = text[:20_000]
    return len(sample) / len(tokenizer.encode(sample, add_special_tokens=False))
