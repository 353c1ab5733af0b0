"""The requests that `/v1/completions` and `/v1/chat/completions` take.

Every field that is here has an effect or is harmless to leave without one (docs/api.md says which); any other
is refused by name. A field that is null counts as left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import Field

from trimtab.decoding.constraints.base import StructuredOutputs
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.serving.errors import ApiError
from trimtab.serving.fields import (
    Body,
    Count,
    JsonObject,
    Metadata,
    Penalty,
    Positive,
    Prompt,
    ResponseFormat,
    Stop,
    StreamOptions,
    StructuredFields,
    TokenKey,
    TopLogprobs,
    Unsupported,
)
from trimtab.serving.messages import Message, Tool, ToolChoice

_SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.init)


class GenerationRequest(Body):
    """What both routes take."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Positive | None = None
    best_of: Positive | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    stop: Stop = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[TokenKey, float] | None = None
    prompt_logprobs: TopLogprobs | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredFields | None = None
    # Harmless: they only tell OpenAI who asks and where to look for a cached prompt.
    user: str | None = None

    @property
    def samples(self) -> int:
        """Texts that are made for each prompt."""
        return self.best_of or self.n or 1

    def wish(self) -> StructuredOutputs | None:
        """The form that was asked for. Raises ApiError or RequestError."""
        given = self.structured_outputs
        format = self.response_format
        wished = None if format is None or format.type == "text" else format
        if given is not None and wished is not None:
            raise ApiError(
                400,
                "response_format and structured_outputs are both given; leave one of them out",
                param="structured_outputs",
            )
        if given is not None:
            return StructuredOutputs.of(given.model_dump(by_alias=True, exclude_none=True))
        if format is not None and (format.type == "json_schema") != (format.json_schema is not None):
            raise ApiError(
                400,
                "response_format.json_schema goes with the type 'json_schema', and only with it",
                param="response_format.json_schema",
            )
        if wished is None:
            return None
        if wished.json_schema is not None:
            return StructuredOutputs(json=wished.json_schema.schema_)
        return StructuredOutputs(json_object=True)

    def sampling(self, wish: StructuredOutputs | None, **changes: Any) -> SamplingParams:
        """The parameters of decoding. Raises RequestError."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name, None)) is not None}
        return SamplingParams(**(given | {"logprobs": None, "structured_outputs": wish} | changes))

    def check(self) -> None:
        """Refuse what cannot be had together."""
        if not self.stream and self.stream_options is not None:
            raise ApiError(
                400,
                "stream_options is given but stream is not true; leave it out or set stream to true",
                param="stream_options",
            )
        if self.stream and self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(
                400,
                f"best_of is {self.best_of} but a stream cannot take texts back; set stream to false, or "
                "leave best_of out",
                param="best_of",
            )


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    suffix: str | None = Field(None, max_length=0, description="Not supported: null or empty.")

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(
                400,
                "max_tokens is 0, which only makes sense with echo; ask for at least one token",
                param="max_tokens",
            )


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    # Only what says what happens anyway.
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Metadata | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Known to OpenAI's clients, which may send null.
    audio: Unsupported = None
    prediction: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    web_search_options: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0:
            raise ApiError(400, "max_tokens is 0; ask for at least one token", param="max_tokens")
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError(
                400,
                f"max_tokens is {self.max_tokens} and max_completion_tokens is {self.max_completion_tokens}; "
                "they mean the same, give one of them",
                param="max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                400, "top_logprobs is given but logprobs is not true; set logprobs too", param="top_logprobs"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400,
                "continue_final_message and add_generation_prompt are both true; only one can be",
                param="continue_final_message",
            )
