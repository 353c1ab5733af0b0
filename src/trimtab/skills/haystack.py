"""Hay cut from a text, and needles put into it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from trimtab.skills.texts import breaks, find_breaks


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
        spots = (0, *find_breaks(self.text), len(self.text))
        wanted = depth * len(self.text)
        spot = min(spots, key=lambda s: abs(s - wanted))
        before, after = self.text[:spot], self.text[spot:]
        glue = "" if not before or before[-1].isspace() else " "
        return Haystack(f"{before}{glue}{sentence}{' ' if after else ''}{after}")


def _whole_sentences(text: str, characters: int) -> str:
    ends = [b for b in find_breaks(text) if b <= characters]
    return text[: ends[-1] if ends else characters].rstrip()
