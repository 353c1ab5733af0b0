"""Generated exercises as conversations: exercise number i of a seed is always the same."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from trimtab.errors import ConfigError
from trimtab.models.detokenizer import token_bytes
from trimtab.models.tokenizer import Tokenizer
from trimtab.skills import SKILLS, Passages, World
from trimtab.skills.chats import EQUAL_WEIGHTS, check_weights, conversation, drill
from trimtab.training.data.chat_format import TrainOn, conversation_segment
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source
from trimtab.training.data.token_store import TokenStore

_LEAD = 1_000  # characters beyond an excerpt, in which `Passages` looks for the start of a sentence
_DRAWS = 1_000
_WITHIN_WORD = re.compile(r"^\S*\s*")


class StoreTexts:
    """Prose out of a token store, for exercises that hide things in text.

    Raises ConfigError where the tokens hold hardly any text.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer) -> None:
        self.store = store
        # Looking bytes up is a hundred times faster than the tokenizer's `decode`.
        special = tokenizer.special_ids
        self._bytes = [
            b"" if i in special else token_bytes(tokenizer, i) for i in range(tokenizer.vocab_size)
        ]
        sample = self.store.tokens[:10_000]
        self._characters = len(self._text(sample)) / len(sample)  # a token
        if self._characters < 0.1:
            raise ConfigError(f"{store.folder} holds no text for exercises; give it prose")

    def excerpt(self, rng: random.Random, characters: int) -> str:
        """At most `characters` characters of one document, whole sentences where there are any."""
        for _ in range(_DRAWS):
            text = self._passage(rng, characters)
            if text.strip():
                return Passages(text).excerpt(rng, characters)
        raise ConfigError(f"{self.store.folder} holds hardly any text for exercises; give it prose")

    def _passage(self, rng: random.Random, characters: int) -> str:
        """Text from the start of a word on, long enough for an excerpt if its document is."""
        at = rng.randrange(len(self.store.tokens))
        document = int(self.store.ends.searchsorted(at, side="right"))
        begin = int(self.store.ends[document - 1]) if document else 0
        end = int(self.store.ends[document])
        # Some stretches have shorter tokens than others.
        need = int(1.2 * (characters + _LEAD) / self._characters)
        start = max(begin, min(at, end - need))
        text = self._text(self.store.tokens[start : min(start + need, end)])
        return text if start == begin else _WITHIN_WORD.sub("", text)

    def _text(self, tokens: np.ndarray) -> str:
        return b"".join(map(self._bytes.__getitem__, tokens.tolist())).decode("utf-8", errors="ignore")


class Skills(Source):
    """Conversations of the skills in proportion to `weights`; `world` says what they are made from.

    A long exercise is a conversation alone. Conversations of more than `max_tokens` are left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        world: World,
        weights: Mapping[str, float] | None,
        seed: int,
        train_on: Literal["auto", "answers", "all"] = "auto",
        max_tokens: int | None = None,
    ) -> None:
        self.tokenizer, self.world, self.seed = tokenizer, world, seed
        self.weights = dict(EQUAL_WEIGHTS if weights is None else weights)
        check_weights(self.weights)
        self.train_on, self.max_tokens = train_on, max_tokens
        self.cursor = 0

    def next(self) -> Segment:
        for _ in range(_DRAWS):
            segment = self._draw(random.Random(f"{self.seed} {self.cursor}"))
            self.cursor += 1
            if self.max_tokens is None or len(segment) <= self.max_tokens:
                return segment
        raise ConfigError(
            f"{_DRAWS} exercises in a row have more than {self.max_tokens} tokens; give shorter "
            "'characters' in 'world', or a larger 'max_tokens'"
        )

    def _draw(self, rng: random.Random) -> Segment:
        name = rng.choices(list(self.weights), list(self.weights.values()))[0]
        if SKILLS[name].long:
            messages = conversation(SKILLS[name].make(rng, self.world))
            # The prose of a long exercise is text like any other.
            on: TrainOn = "answers" if self.train_on == "answers" else "all"
        else:
            short = {n: w for n, w in self.weights.items() if not SKILLS[n].long}
            messages = drill(rng, self.world, short)
            # The questions of short ones are noise.
            on = "all" if self.train_on == "all" else "answers"
        return conversation_segment(self.tokenizer, messages, on)

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]
