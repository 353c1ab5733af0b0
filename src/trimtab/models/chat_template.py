"""Chat templates: a conversation becomes one prompt string, as the checkpoint's Jinja template says.

Templates come with checkpoints, that is from strangers. They run in Jinja's sandbox, see copies made of
plain JSON types only, and cannot spin or fill memory: the numbers of `range` and the sizes of repeated
texts are bounded. The variables, filters and tags are those `transformers` offers, and so is the output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from trimtab.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    import jinja2

MAX_RANGE_ITEMS = 1_000_000
MAX_OUTPUT_CHARACTERS = 64 * 1024 * 1024
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_HERE = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """The chat templates of one checkpoint.

    `templates` maps names to Jinja sources; `default` is used, or `tool_use` when tools are passed.
    `special_tokens` are variables of the template (`bos_token`, `eos_token`, ...).
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.templates = dict(templates)
        self.special_tokens = dict(special_tokens)

    def source(self, template: str | None = None, with_tools: bool = False) -> str:
        """The template to use: a name of the checkpoint's, Jinja source, or (None) the default."""
        if template is not None:
            if template in self.templates:
                return self.templates[template]
            if "{" not in template and "\n" not in template:
                raise RequestError(
                    f"there is no chat template called {template!r}.{did_you_mean(template, self.templates)}"
                )
            return template
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        if self.templates:
            raise RequestError(
                "this model has several chat templates and none is the default; pass chat_template= with "
                f"one of: {', '.join(sorted(self.templates))}"
            )
        raise RequestError(
            "this model has no chat template, so it cannot take messages; pass plain prompts, or "
            "chat_template= with a Jinja template, or put a chat_template.jinja into the model's folder"
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt string. Raises RequestError with the template's own message where it refuses."""
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        source = self.source(template, with_tools=tools is not None)
        chat = _plain_messages(messages)
        final = _mark_final(chat, source) if continue_final_message else ""
        context = {
            **self.special_tokens,
            **_plain(dict(variables or {})),
            "messages": chat,
            "tools": _plain_dicts("tools", tools),
            "documents": _plain_dicts("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = _rendered(_compile(source), context)
        except TemplateSyntaxError as error:
            where = f"line {error.lineno}"
            raise RequestError(f"the chat template is malformed, {where}: {error.message}") from None
        except TemplateError as error:
            raise RequestError(f"the chat template refused these messages: {error}") from None
        except RecursionError:
            raise RequestError("the chat template calls itself without end") from None
        except Exception as error:  # a template can raise anything its expressions can
            raise RequestError(
                f"the chat template failed on these messages: {type(error).__name__}: {error}"
            ) from None
        return _cut_at_mark(text, final) if continue_final_message else text


def _rendered(template: jinja2.Template, context: dict[str, Any]) -> str:
    pieces: list[str] = []
    length = 0
    for piece in template.generate(context, range=_bounded_range()):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_OUTPUT_CHARACTERS:
            raise OverflowError(f"the output is longer than {MAX_OUTPUT_CHARACTERS} characters")
    return "".join(pieces)


def _bounded_range() -> Any:
    """`range`, with a bound on the items of all calls of one rendering together, so that no loop spins."""
    left = MAX_RANGE_ITEMS

    def bounded(*args: int) -> range:
        nonlocal left
        numbers = range(*args)
        left -= len(numbers) + 1
        if left < 0:
            raise OverflowError(f"its loops take more than {MAX_RANGE_ITEMS} steps")
        return numbers

    return bounded


@cache
def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationTag(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; plain here."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block, not the bare body: the tag opens its own scope for `set`.
            return jinja2.nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

        def _words(self, caller: Any) -> str:
            return caller()

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            powers = operator == "**" and isinstance(left, int) and isinstance(right, int)
            if powers and left.bit_length() * right > MAX_RANGE_ITEMS:
                raise OverflowError("a power has too many digits")
            if operator == "*":
                for value, times in ((left, right), (right, left)):
                    if not (isinstance(value, str | list | tuple) and isinstance(times, int)):
                        continue
                    if len(value) * times > MAX_RANGE_ITEMS:
                        raise OverflowError(f"a repeated text is longer than {MAX_RANGE_ITEMS} characters")
            return super().call_binop(context, operator, left, right)

    class PlainNamespace(Namespace):
        """A namespace that keeps no underscore names, the usual way towards Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            # `self` is taken from args so that a template may store an attribute of that name.
            values = dict(*args[1:], **kwargs)
            for name in values:
                PlainNamespace._check(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            PlainNamespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the underscore name {name!r}")

    class DictMaker:
        """`dict(...)` and `dict.fromkeys` without the type itself."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML, which would put \u003c into prompts.
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["dict"] = DictMaker()
    environment.globals["namespace"] = PlainNamespace
    return environment


@cache
def _compile(source: str) -> Any:
    return _environment().from_string(source)


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages without None values, the reasoning also under the names templates look for."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a list of at least one message, each with a role and a content")
    chat = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise RequestError(f"a message is {message!r}; it must be a mapping with a role and a content")
        plain = _plain({key: value for key, value in message.items() if value is not None})
        reasoning = next((plain[key] for key in _REASONING_FIELDS if plain.get(key) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        chat.append(plain)
    return chat


def _plain_dicts(name: str, values: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    if values is None:
        return None
    if isinstance(values, str | Mapping) or not all(isinstance(v, Mapping) for v in values):
        raise RequestError(f"{name} must be a list of mappings, found {values!r}")
    return [_plain(v) for v in values]


def _plain(value: Any) -> Any:
    """`value` rebuilt from JSON types; other objects become `<TypeName>`, out of the template's reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    # Subclasses (enums, numpy numbers) may carry methods a template should not call.
    if isinstance(value, str):
        return str.__str__(value)
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


def _mark_final(chat: list[dict[str, Any]], source: str) -> str:
    """Put a mark at the end of the last message's words and return them; the prompt is cut there later."""
    content = chat[-1].get("content")
    if isinstance(content, list):
        block = next((b for b in reversed(content) if isinstance(b, dict) and "text" in b), None)
        if block is not None:
            words = block["text"]
            block["text"] = words + _CONTINUE_HERE
            return words
    if not isinstance(content, str):
        raise RequestError("continue_final_message is set, but the last message has no text to continue")
    if "content" not in source:
        raise RequestError("continue_final_message is set, but the chat template does not use `content`")
    chat[-1]["content"] = content + _CONTINUE_HERE
    return content


def _cut_at_mark(text: str, final: str) -> str:
    at = text.rfind(_CONTINUE_HERE.strip())
    if at < 0 or final.strip() not in text:
        raise RequestError(
            "continue_final_message is set, but the chat template does not print the last message as it is"
        )
    kept_spacing = text.startswith(_CONTINUE_HERE, at)
    return text[:at] if kept_spacing else text[:at].rstrip()
