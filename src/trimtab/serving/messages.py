"""Chat messages and tools as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from trimtab.serving.fields import Body, JsonObject, Unsupported, refuse, shown


def _content(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refuse(f"is {shown(value)}; it must be a text or a list of parts")
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or "type" not in part:
            raise refuse(f"[{i}] is {shown(part)}; a part is an object with a type and a text")
        if part["type"] != "text":
            raise refuse(f"[{i}] is of type {shown(part['type'])}; this server takes text only")
        unknown = sorted(part.keys() - {"type", "text"})
        if unknown:
            raise refuse(f"[{i}] has the field {shown(unknown[0])}; a text part has a type and a text")
        if not isinstance(part.get("text"), str):
            raise refuse(f"[{i}].text must be a text")
        texts.append(part["text"])
    return "\n".join(texts)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    Any,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}),
]


class CalledFunction(Body):
    name: str
    arguments: str = Field(description="JSON, as a text.")


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """One message. `developer` counts as `system`; content parts are joined by newlines."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What OpenAI's own answers carry, so that an answer can be sent back as it came.
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    annotations: Unsupported = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise refuse(" has no content; give it a text")
        if self.role != "assistant":
            for name in ("tool_calls", "reasoning_content"):
                if getattr(self, name):
                    raise refuse(f" has {name}, which only messages of the assistant have")
        if self.role == "tool" and not self.tool_call_id:
            raise refuse(" has no tool_call_id; name the call that it answers")
        if self.role != "tool" and self.tool_call_id:
            raise refuse(" has a tool_call_id, which only messages of the role 'tool' have")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        message = self.model_dump(exclude_none=True, exclude={"annotations"})
        if self.role == "developer":
            message["role"] = "system"
        for call in message.get("tool_calls", ()):
            call.pop("index", None)
        return message


class FunctionDefinition(Body):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


def _tool_choice(value: Any) -> Any:
    if value is None or value in ("none", "auto", "required"):
        return value
    named = isinstance(value, dict) and value.keys() == {"type", "function"} and value["type"] == "function"
    function = value["function"] if named else None
    if isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str):
        return value
    raise refuse(
        f"is {shown(value)}; it must be 'none', 'auto', 'required', or "
        '{"type": "function", "function": {"name": ...}}'
    )


ToolChoice = Annotated[
    Any,
    PlainValidator(_tool_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required", None]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                            "required": ["name"],
                            "additionalProperties": False,
                        },
                    },
                    "required": ["type", "function"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
