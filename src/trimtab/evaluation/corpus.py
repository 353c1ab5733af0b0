"""Where evaluation text comes from, and hay cut from it."""

from __future__ import annotations

import importlib.resources
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trimtab.errors import ConfigError

WIKITEXT_PLACES = ("wikitext-2/test.txt", "wikitext-2/wiki.test.tokens", "test.txt", "wiki.test.tokens")
# An end of sentence (not of "Mr."), its closing quotes, then white space and a capital or a quote.
_BREAK = re.compile(r"""(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)["')]*(\s+)(?=["'(]?[A-Z])""")


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


@cache
def breaks(text: str) -> tuple[int, ...]:
    """The character offsets at which a sentence of `text` starts (other than the first)."""
    return tuple(m.end() for m in _BREAK.finditer(text))


@dataclass(frozen=True, slots=True)
class Haystack:
    """A passage of whole sentences into which other sentences can be put."""

    text: str

    @classmethod
    def draw(cls, source: str, rng: random.Random, *, characters: int) -> Haystack:
        """A passage of at most `characters` characters from `source`, starting at a drawn sentence.

        A source that is too short is repeated.
        """
        starts = [b for b in breaks(source) if b + characters <= len(source)]
        if not starts:
            return cls(_whole_sentences(source * (characters // len(source) + 1), characters))
        start = rng.choice(starts)
        return cls(_whole_sentences(source[start : start + characters + 1], characters))

    def insert(self, sentence: str, *, depth: float) -> Haystack:
        """`sentence` put at the sentence boundary nearest to `depth` (0 = in front, 1 = at the end)."""
        spots = (0, *breaks(self.text), len(self.text))
        wanted = depth * len(self.text)
        spot = min(spots, key=lambda s: abs(s - wanted))
        before, after = self.text[:spot], self.text[spot:]
        glue = "" if not before or before[-1].isspace() else " "
        return Haystack(f"{before}{glue}{sentence}{' ' if after else ''}{after}")


def _whole_sentences(text: str, characters: int) -> str:
    ends = [b for b in breaks(text) if b <= characters]
    return text[: ends[-1] if ends else characters].rstrip()
