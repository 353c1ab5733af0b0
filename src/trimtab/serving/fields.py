"""Types that the request models share; a refusal is a sentence that continues the field's name."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
_REFUSED = "refused"


class Body(BaseModel):
    """A JSON object with these fields and no others; nothing is converted ("1" is not 1)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def refuse(sentence: str) -> PydanticCustomError:
    """An error whose text is the field's path and `sentence`."""
    return PydanticCustomError(_REFUSED, "{sentence}", {"sentence": sentence})


def shown(value: Any) -> str:
    """A value as messages quote it, bounded."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number too long to print"
    return text if len(text) <= 100 else text[:97] + "..."


def _finite(value: Any) -> Any:
    """Refuse numbers that JSON does not know, at any depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise refuse(f"holds {item}; JSON has finite numbers only")
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return value


def _stop(value: Any) -> Any:
    if value is None or isinstance(value, str):
        texts = [value] if value else []
    elif isinstance(value, list) and all(isinstance(text, str) for text in value):
        texts = value
    else:
        raise refuse(f"is {shown(value)}; it must be a text or a list of texts")
    if len(texts) > MAX_STOPS:
        raise refuse(f"has {len(texts)} texts; at most {MAX_STOPS} are taken")
    if any(len(text) > MAX_STOP_CHARACTERS for text in texts):
        raise refuse(f"has a text of more than {MAX_STOP_CHARACTERS} characters; shorten it")
    return value


def _prompt(value: Any) -> Any:
    if isinstance(value, str):
        return value
    items = value if isinstance(value, list) else [None]
    if not items:
        raise refuse("is empty; give a text, a list of token ids, or a list of either")
    if _all_ids(items) or all(isinstance(item, str) for item in items):
        return value
    if all(isinstance(item, list) and _all_ids(item) for item in items):
        return value
    raise refuse("must be a text, a list of token ids, or a list of either, all of one kind")


def _all_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def _none(value: Any) -> Any:
    if value is not None and value != []:
        raise refuse("is not supported by this server; leave it out")
    return value


_TEXTS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}

Json = Annotated[Any, AfterValidator(_finite)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_finite)]
Stop = Annotated[
    Any,
    PlainValidator(_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
                    "maxItems": MAX_STOPS,
                },
                {"type": "null"},
            ]
        }
    ),
]
Prompt = Annotated[
    Any,
    PlainValidator(_prompt),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": {**_IDS, "minItems": 1}}]}
    ),
]
Unsupported = Annotated[Any, PlainValidator(_none), WithJsonSchema({"type": "null"})]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]
Metadata = Annotated[dict[str, str], Field(max_length=16)]


class StreamOptions(Body):
    """What a stream reports besides the text."""

    include_usage: bool | None = Field(None, description="A last chunk with the number of tokens.")
    continuous_usage_stats: bool | None = Field(
        None, description="Token counts and the `trimtab` object on every chunk."
    )
    include_obfuscation: Literal[False] | None = Field(None, description="Only false: nothing is padded.")


class StructuredFields(Body):
    """The form that the text must have, with vLLM's field names; exactly one of the first five."""

    json_: Json = Field(None, alias="json", description="A JSON schema.")
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = Field(None, description="A grammar in Lark's notation; its first rule is `start`.")
    choice: list[str] | None = None
    disable_any_whitespace: bool | None = None


class JsonSchemaFormat(Body):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's `response_format`. A schema is always kept to, whether or not `strict` is set."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
