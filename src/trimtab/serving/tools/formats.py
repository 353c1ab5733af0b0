"""The forms in which checkpoints write tool calls, one row each, and which one a chat template speaks.

A run of calls is `opening`, a call, any number of (`between`, a call), `closing`; a call is the JSON object
`{"name": NAME, <arguments_key>: {...}}`. White space may stand between all of these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from trimtab.errors import ConfigError, did_you_mean
from trimtab.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolFormat:
    """How one family of checkpoints writes its calls.

    Attributes:
        name: as in `--tool-format`.
        opening: texts before the first call; the first of them is the trigger that ends free text.
        between: texts between two calls.
        closing: texts after the last call.
        arguments_key: the JSON key of a call's arguments.
        bare: a message may also begin with a call's JSON itself, without `opening`.
        short_ids: call ids are nine letters or digits, which the templates insist on; a model that saw them
            there may also write one, as `id` after the arguments.
    """

    name: str
    opening: tuple[str, ...]
    between: tuple[str, ...]
    closing: tuple[str, ...]
    arguments_key: str = "arguments"
    bare: bool = False
    short_ids: bool = False

    @property
    def trigger(self) -> str:
        return self.opening[0]

    def marker_ids(self, tokenizer: Tokenizer) -> dict[str, int | None]:
        """The texts around calls; with each its id where it is a token added to the vocabulary for this."""
        added = {str(token.content): i for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
        return {text: added.get(text) for text in (*self.opening, *self.between, *self.closing)}


_TAGS: Final = (("<tool_call>",), ("</tool_call>", "<tool_call>"), ("</tool_call>",))
GENERIC: Final = ToolFormat("generic", *_TAGS)
FORMATS: Final = {
    row.name: row
    for row in (
        ToolFormat("hermes", *_TAGS),
        ToolFormat("llama3", ("<|python_tag|>",), (";",), (), "parameters", bare=True),
        ToolFormat("mistral", ("[TOOL_CALLS]", "["), (",",), ("]",), short_ids=True),
        GENERIC,
    )
}
NAMES: Final = (*FORMATS, "auto")

# Relatives that share a marker with a row, but write the call itself in another way.
_OTHER_FORMS: Final = ("<function=", "<arg_key>", "[ARGS]", "[CALL_ID]")


def format_called(name: str, template_source: str) -> ToolFormat:
    """The format of a `--tool-format` name, `auto` being what the template speaks. Raises ConfigError."""
    if name == "auto":
        return detect(template_source)
    if name not in FORMATS:
        raise ConfigError(f"tool_format is {name!r}, which is no tool format.{did_you_mean(name, NAMES)}")
    return FORMATS[name]


def detect(template_source: str) -> ToolFormat:
    """The format that a chat template's source shows; generic where it shows none that is known here."""
    if not shows_tools(template_source) or any(form in template_source for form in _OTHER_FORMS):
        return GENERIC
    if "[TOOL_CALLS]" in template_source:
        return FORMATS["mistral"]
    if "<tool_call>" in template_source:
        return FORMATS["hermes"]
    llama = "ipython" in template_source or "<|python_tag|>" in template_source
    if llama and re.search(r"""["']parameters["']""", template_source):
        return FORMATS["llama3"]
    return GENERIC


@lru_cache(maxsize=64)
def shows_tools(template_source: str) -> bool:
    """Whether the template has a use for `tools`; where it has none they would be dropped without a word."""
    import jinja2

    try:
        words = jinja2.Environment().lex(template_source)
        return any(kind == "name" and word == "tools" for _, kind, word in words)
    except jinja2.TemplateSyntaxError:
        return False  # rendering will say what is wrong with it


def template_source(tokenizer: Tokenizer, chat_template: str | None = None, with_tools: bool = True) -> str:
    """The source of the template that a request uses: the checkpoint's, one of its named ones, or its own.

    Raises RequestError where there is none.
    """
    from trimtab.models.chat_template import ChatTemplate

    templates = ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens)
    return templates.source(chat_template, with_tools=with_tools)
