"""Generated exercises as conversations: exercise number i of a seed is always the same."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from trimtab.models.tokenizer import Tokenizer
from trimtab.skills import SKILLS, World, drill
from trimtab.training.data.chat_format import conversation_segment
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source
from trimtab.training.data.token_store import TokenStore


class StoreTexts:
    """Prose out of a token store, for exercises that hide things in text."""

    def __init__(self, store: TokenStore, tokenizer: Tokenizer) -> None:
        self.store, self.tokenizer = store, tokenizer

    def excerpt(self, rng: random.Random, characters: int) -> str:
        """At most `characters` characters of one document, from the start of a word on."""
        at = rng.randrange(len(self.store.tokens))
        document = int(self.store.ends.searchsorted(at, side="right"))
        begin = int(self.store.ends[document - 1]) if document else 0
        end = int(self.store.ends[document])
        need = characters // 2 + 16  # a token is seldom less than two characters of prose
        start = max(begin, min(at, end - need))
        text = self.tokenizer.decode([int(t) for t in self.store.tokens[start : start + need] if True])
        text = text.split(" ", 1)[-1][:characters]
        return text.rsplit(" ", 1)[0].strip()


class Skills(Source):
    """Conversations of the skills in proportion to `weights`; `world` says what they are made from."""

    def __init__(self, tokenizer: Tokenizer, world: World, weights: Mapping[str, float], seed: int) -> None:
        self.tokenizer, self.world, self.weights, self.seed = tokenizer, world, dict(weights), seed
        self.cursor = 0

    def next(self) -> Segment:
        rng = random.Random(f"{self.seed} {self.cursor}")
        self.cursor += 1
        name = rng.choices(list(self.weights), list(self.weights.values()))[0]
        messages = drill(rng, self.world, {name: 1.0})
        # The prose of a long exercise is text like any other; questions of short ones are noise.
        return conversation_segment(self.tokenizer, messages, "all" if SKILLS[name].long else "answers")

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]
