"""Conversations as text, with the words of the answers marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.errors import ConfigError
from trimtab.models.chat_template import ChatTemplate
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.encoding import Marked, encode
from trimtab.training.data.segments import Segment

TrainOn = Literal["answers", "last", "all"]
_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
_MARK = "\uf8f3\uf8f4"  # private characters that no text has side by side


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages (dicts with `role` and `content`), and what else a chat template takes.

    `prompt` messages at the beginning are given, never learnt.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    prompt: int = 0


def conversation_segment(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], train_on: TrainOn = "answers"
) -> Segment:
    """`messages` through the tokenizer's chat template as tokens; see `mark_conversation`."""
    return encode(tokenizer, [mark_conversation(tokenizer, Conversation(messages), train_on)])[0]


def mark_conversation(tokenizer: Tokenizer, chat: Conversation, train_on: TrainOn = "answers") -> Marked:
    """The conversation through the tokenizer's chat template.

    `train_on="answers"` marks what the template encloses in `{% generation %}`, or where it has no such
    tags what an assistant's turn adds to the conversation before it: with the token that ends the turn,
    without the words that open it. `"last"` marks the last answer only, `"all"` the whole text.
    Raises ConfigError where there is no answer or the template does not let answers be told apart, and
    RequestError where the template refuses the messages.
    """
    if not any(m.get("role") == "assistant" for m in chat.messages[chat.prompt :]):
        raise ConfigError("a conversation to train on has no message with the role 'assistant'")
    text = tokenizer.apply_chat_template(chat.messages, add_generation_prompt=False, tools=chat.tools)
    if train_on == "all":
        return Marked(text)
    spans = _tagged(tokenizer, chat, text)
    if spans is None:
        spans = _added(tokenizer, chat, text)
    elif chat.prompt:
        answers = sum(m.get("role") == "assistant" for m in chat.messages[: chat.prompt])
        spans = spans[answers:]
    if not spans:
        raise ConfigError("the chat template marks no words of this conversation's answers")
    return Marked(text, spans[-1:] if train_on == "last" else spans)


def _tagged(tokenizer: Tokenizer, chat: Conversation, text: str) -> tuple[tuple[int, int], ...] | None:
    """The spans that the template's own `generation` tags enclose, or None where it has none."""
    template = ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens)
    source = template.source(with_tools=chat.tools is not None)
    if not _TAG.search(source):
        return None
    # An empty block with the tag's own right-hand mark leaves the template's rules for white space alone.
    marking = _TAG.sub(lambda tag: f"{tag[0]}{{% if true %}}{{{{ '{_MARK}' }}}}{{% endif {tag[2]}%}}", source)
    marked = tokenizer.apply_chat_template(
        chat.messages, add_generation_prompt=False, tools=chat.tools, chat_template=marking
    )
    pieces = marked.split(_MARK)
    if "".join(pieces) != text:
        raise ConfigError("the answers of a conversation hold the characters U+F8F3 U+F8F4; take them out")
    edges = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces) - 1)]
    return tuple((begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end)


def _added(tokenizer: Tokenizer, chat: Conversation, text: str) -> tuple[tuple[int, int], ...]:
    """The spans that assistant turns add to what stands before them; a first message answers nothing."""
    spans = []
    for i, message in enumerate(chat.messages):
        if i < max(chat.prompt, 1) or message.get("role") != "assistant":
            continue
        before = tokenizer.apply_chat_template(chat.messages[:i], tools=chat.tools)
        after = text
        if i + 1 < len(chat.messages):
            after = tokenizer.apply_chat_template(
                chat.messages[: i + 1], add_generation_prompt=False, tools=chat.tools
            )
        if not text.startswith(after) or not after.startswith(before):
            raise ConfigError(
                "this chat template writes a turn differently once more turns follow, so the tokens of an "
                "answer cannot be told; set 'train_on: all' or give the tokenizer another template"
            )
        spans.append((len(before), len(after)))
    return tuple(spans)
