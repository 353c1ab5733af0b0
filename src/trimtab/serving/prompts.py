"""Prompts as token ids that fit the model's context."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.errors import RequestError
from trimtab.serving.errors import ApiError

if TYPE_CHECKING:
    from trimtab.serving.models import ServedModel

_SHORT_TEXT = 4096  # characters; tokenizing more would hold up the other streams
TOO_LONG = "context_length_exceeded"


async def encode(
    served: ServedModel, prompts: Sequence[str | list[int]], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of each prompt. Raises RequestError where one is empty or cannot be tokenized."""
    texts = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    if texts > _SHORT_TEXT:
        return await asyncio.to_thread(_encode, served, prompts, add_special_tokens)
    return _encode(served, prompts, add_special_tokens)


def _encode(
    served: ServedModel, prompts: Sequence[str | list[int]], add_special_tokens: bool
) -> list[list[int]]:
    tokenizer = served.tokenizer
    found = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise RequestError("the prompt is text but this model has no tokenizer; give token ids")
            ids = tokenizer.encode(prompt, add_special_tokens)
        else:
            ids = prompt
        if not ids or prompt == "":
            raise RequestError(f"the prompt is empty{_which(i, prompts)}; give at least one token")
        found.append(ids)
    return found


def check_room(served: ServedModel, prompts: Sequence[list[int]], max_tokens: int | None, param: str) -> None:
    """Raise ApiError, with the lengths, where a prompt and its answer are longer than the context."""
    limit = served.context
    if served.engine.cache.endless:  # goes on beyond the context; the engine says what it needs for that
        return
    for i, ids in enumerate(prompts):
        which = _which(i, prompts)
        if len(ids) >= limit:
            raise ApiError(
                400,
                f"the prompt{which} has {len(ids)} tokens and the model's context is {limit} tokens, which "
                "must hold the answer too; shorten it",
                param=param,
                code=TOO_LONG,
            )
        if max_tokens is not None and len(ids) + max_tokens > limit:
            raise ApiError(
                400,
                f"the prompt{which} has {len(ids)} tokens and max_tokens is {max_tokens}, together "
                f"{len(ids) + max_tokens}, but the model's context is {limit} tokens; shorten the prompt or "
                f"ask for at most {limit - len(ids)}",
                param=param,
                code=TOO_LONG,
            )


def decode(served: ServedModel, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of a prompt that came as token ids; empty for a model without a tokenizer."""
    return served.tokenizer.decode(ids, skip_special_tokens) if served.tokenizer is not None else ""


def _which(index: int, prompts: Sequence[object]) -> str:
    return f" number {index + 1} of {len(prompts)}" if len(prompts) > 1 else ""
