"""Conversations and prompt/completion pairs as tokens, with what is to be learnt marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.errors import ConfigError
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.segments import Segment


def conversation_segment(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], train_on: str = "answers"
) -> Segment:
    """`messages` (dicts with `role` and `content`) through the tokenizer's chat template.

    `train_on="answers"` marks what an assistant's turn adds to the conversation before it, the token that
    ends the turn included and the words that open it not; `"all"` marks every token.
    """
    if not any(m["role"] == "assistant" for m in messages):
        raise ConfigError("a conversation to train on has no message with the role 'assistant'")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    tokens = np.array(encoded.ids)
    if train_on == "all":
        return Segment(tokens, np.ones(len(tokens), dtype=bool))
    trained = np.zeros(len(text) + 1, dtype=bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
        if not text.startswith(after) or not after.startswith(before):
            raise ConfigError(
                "this chat template writes a turn differently once more turns follow, so the tokens of an "
                "answer cannot be told; set 'train_on: all' or give the tokenizer another template"
            )
        trained[len(before) : len(after)] = True
    marks = np.array([trained[a] and b > a for a, b in encoded.offsets])
    return Segment(tokens, marks)
