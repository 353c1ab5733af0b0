"""Real prose for exercises: excerpts and sentences out of texts."""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from trimtab.errors import ConfigError

# An end of sentence (not of "Mr."), its closing quotes, then white space and a capital or a quote.
_BREAK = re.compile(r"""(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)["')]*(\s+)(?=["'(]?[A-Z])""")
_SPACE = re.compile(r"\s+")
_LEAD = 1_000  # characters in which the start of a sentence is looked for
_SENTENCE = (12, 110)  # characters of a sentence to be copied
_PIECE = 600  # characters of an excerpt from which one sentence is taken


class Texts(Protocol):
    """Whatever can give prose."""

    def excerpt(self, rng: random.Random, characters: int) -> str:
        """A drawn passage of at most `characters` characters that ends with a sentence or a word."""
        ...


def find_breaks(text: str) -> tuple[int, ...]:
    """The character offsets at which a sentence of `text` starts (other than the first)."""
    return tuple(match.end() for match in _BREAK.finditer(text))


@cache
def breaks(text: str) -> tuple[int, ...]:
    """`find_breaks`, remembered: for a few texts that are looked at again and again."""
    return find_breaks(text)


class Passages:
    """Excerpts out of one text or several; a text is chosen in proportion to its length."""

    def __init__(self, texts: str | Sequence[str]) -> None:
        """Raises ConfigError when there is no text or none has a word."""
        self.texts = [t for t in ([texts] if isinstance(texts, str) else texts) if t.strip()]
        if not self.texts:
            raise ConfigError("the exercises need at least one text to take prose from, and all are empty")
        self._ends = list(itertools.accumulate(len(text) for text in self.texts))

    def excerpt(self, rng: random.Random, characters: int) -> str:
        """See `Texts`. A text shorter than `characters` is given whole."""
        at = rng.randrange(self._ends[-1])
        text = self.texts[bisect.bisect_right(self._ends, at)]
        start = max(0, min(rng.randrange(len(text)), len(text) - characters - _LEAD))
        window = text[start : start + _LEAD + characters]
        if start:
            window = window[_first_start(window) :]
        return _whole(window, characters) if len(window) > characters else window.strip()


def _first_start(window: str) -> int:
    """Where the first sentence starts, or the first word where no sentence does."""
    found = _BREAK.search(window, 0, _LEAD) or _SPACE.search(window, 0, _LEAD)
    return found.end() if found else 0


def _whole(text: str, characters: int) -> str:
    """The beginning of `text`, cut after a sentence, or after a word where that would lose half of it."""
    ends = [b for b in find_breaks(text[: characters + 2]) if b <= characters]
    if ends and ends[-1] > characters // 2:
        return text[: ends[-1]].strip()
    if text[characters].isspace():
        return text[:characters].strip()
    spaces = list(_SPACE.finditer(text, 0, characters))
    return text[: spaces[-1].start() if spaces else characters].strip()


def sentence(texts: Texts, rng: random.Random) -> str:
    """One sentence of 12 to 110 characters on one line, or a few words where the passage has none."""
    piece = " ".join(texts.excerpt(rng, _PIECE).split())
    spots = [0, *find_breaks(piece), len(piece)]
    sentences = [piece[a:b].strip() for a, b in itertools.pairwise(spots)]
    least, most = _SENTENCE
    fitting = [s for s in sentences if least <= len(s) <= most]
    if fitting:
        return rng.choice(fitting)
    return " ".join(piece.split()[: rng.randint(3, 10)])[:most]
