"""Questions in the form a model expects them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.engine.engine import Engine
    from trimtab.models.tokenizer import Tokenizer

_MARK = "\ue000"  # a private-use character that no template and no question contains


def tokenizer_of(engine: Engine, task: str) -> Tokenizer:
    """The engine's tokenizer; a ConfigError where its model has none."""
    tokenizer = engine.model.tokenizer
    if tokenizer is None or not tokenizer.available:
        raise ConfigError(f"task {task!r} needs text, and this model has no tokenizer; name a model that has")
    return tokenizer


def has_chat_template(tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.chat_templates)


def frame(tokenizer: Tokenizer) -> tuple[str, str]:
    """The text before and after a user's words, up to where the assistant's answer begins.

    Without a chat template the answer simply starts on a new line.
    """
    if not has_chat_template(tokenizer):
        return "", "\n"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}])
    before, _, after = rendered.partition(_MARK)
    return before, after


def question_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """Token ids of the prompt that asks `question`."""
    before, after = frame(tokenizer)
    templated = has_chat_template(tokenizer)
    return tokenizer.encode(before + question + after, add_special_tokens=not templated)


def split_question_ids(tokenizer: Tokenizer, context: str, question: str) -> tuple[list[int], list[int]]:
    """Like `question_ids(context + question)`, cut where the context ends.

    The two parts are encoded apart, so that nothing of the question reaches into the context.
    """
    before, after = frame(tokenizer)
    templated = has_chat_template(tokenizer)
    head = tokenizer.encode(before + context, add_special_tokens=not templated)
    return head, tokenizer.encode(question + after, add_special_tokens=False)
