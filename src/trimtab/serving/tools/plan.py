"""What a chat request's tools mean for its prompt, for its sampling and for reading its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trimtab.decoding.constraints.base import StructuredOutputs
from trimtab.errors import RequestError
from trimtab.models.tokenizer import Tokenizer
from trimtab.serving.tools import history
from trimtab.serving.tools.definitions import Choice, Function, read_choice, read_tools
from trimtab.serving.tools.formats import GENERIC, ToolFormat, format_called, shows_tools
from trimtab.serving.tools.grammar import CallGrammar, call_grammar
from trimtab.serving.tools.parser import ToolParser

_OWN_FORM: Final = (
    "the chat template writes tool calls in a form that is not known here, so the model was told of the "
    "tools in the generic form"
)


@dataclass(frozen=True)
class ToolPlan:
    """Made by `prepare`.

    Attributes:
        form: how calls are written.
        choice: what the request asks for.
        template_tools: for the `tools` of `apply_chat_template`; None where the template has no use for them.
        wish: the constraint that the request needs; None where any text will do.
        skip_special_tokens: what the sampling parameters must say. False where a marker of the format is a
            special token of this tokenizer: the parser needs to see it, and leaves the end token out itself.
        notes: what a user should know, one sentence each.
    """

    form: ToolFormat
    choice: Choice
    template_tools: list[dict[str, Any]] | None
    skip_special_tokens: bool
    notes: tuple[str, ...]
    _grammar: CallGrammar
    _parallel: bool
    _functions: tuple[Function, ...]
    _written: bool
    _tokenizer: Tokenizer
    _source: str

    @property
    def wish(self) -> StructuredOutputs | None:
        return self._grammar.wish

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template needs them. Raises RequestError for calls it cannot write."""
        if not self._written:
            return history.with_native_calls(messages, self.form, self._tokenizer, self._source)
        out = history.with_written_calls(messages, self.form)
        if self.choice.kind == "none":
            return out
        text = history.system_text(self._functions, self.choice, self._parallel, self.form)
        return history.with_system_text(out, text, self._tokenizer, self._source)

    def parser(self) -> ToolParser:
        """A parser for one answer to this request."""
        if self.choice.kind == "none":
            return ToolParser(None)
        ends = () if self.skip_special_tokens else _texts(self._tokenizer, self._tokenizer.eos_ids)
        return ToolParser(
            self.form,
            drop=ends,
            arguments_of=self._grammar.arguments_of,
            stop_reason_kept=self.choice.kind == "named",
        )


def prepare(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    parallel_tool_calls: bool | None,
    template_source: str,
    tokenizer: Tokenizer,
    format: str = "auto",
) -> ToolPlan:
    """What to do for a chat request, also for one without tools: its history may still hold calls.

    Compiles each tool's schema once to see what can be kept of it: milliseconds, so not for an event loop.

    Args:
        tools, tool_choice, parallel_tool_calls: as in the request; None where it has none.
        template_source: the chat template's source, see `formats.template_source`.
        format: `--tool-format`.

    Raises RequestError for what the request has wrong, ConfigError for an unknown format.
    """
    form = format_called(format, template_source)
    functions = read_tools(tools) if tools is not None else ()
    if parallel_tool_calls is not None and not functions:
        raise RequestError(
            f"parallel_tool_calls is {parallel_tool_calls!r}, but the request has no tools; leave it out"
        )
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise RequestError(f"parallel_tool_calls is {parallel_tool_calls!r}; it must be true or false")
    parallel = parallel_tool_calls is not False
    choice = read_choice(tool_choice, functions)
    # A template without a use for tools would drop them; generic is for those, and for unknown forms.
    written = form is GENERIC or not shows_tools(template_source)
    unknown = format == "auto" and form is GENERIC and shows_tools(template_source)
    grammar = call_grammar(choice, parallel, form, tokenizer)
    special = tokenizer.special_ids.intersection(form.marker_ids(tokenizer).values())
    return ToolPlan(
        form=form,
        choice=choice,
        template_tools=None if written or not functions else [function.shown() for function in functions],
        skip_special_tokens=choice.kind == "none" or grammar.arguments_of is not None or not special,
        notes=(*grammar.notes, *([_OWN_FORM] if unknown and functions else [])),
        _grammar=grammar,
        _parallel=parallel,
        _functions=functions,
        _written=written,
        _tokenizer=tokenizer,
        _source=template_source,
    )


def _texts(tokenizer: Tokenizer, ids: frozenset[int]) -> tuple[str, ...]:
    """How tokens look in decoded text."""
    return tuple(sorted({tokenizer.decode([i], skip_special_tokens=False) for i in ids} - {""}))
