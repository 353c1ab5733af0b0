"""The OpenAPI description: routes read their bodies themselves, so what they take is put in here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from trimtab.serving.protocol import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_FAILURES = {
    "400": "the request cannot be served as it is",
    "401": "an API key is missing or wrong",
    "404": "no such model",
    "413": "the body is too large",
    "415": "the body is not announced as JSON",
    "429": "the queue is full; see Retry-After",
    "500": "a mistake of the server",
    "503": "not ready yet, or shutting down",
    "504": "the request took too long",
}


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """The part of a route's description that says what it takes and how it fails."""
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {
                "description": "the answer, or with `stream: true` its chunks",
                "content": {"application/json": {"schema": {"type": "object"}}} | events,
            }
        }
        | failure(*_FAILURES),
    }


def failure(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The part of a route's description that says how it fails."""
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {code: {"description": _FAILURES[code], "content": error} for code in codes}


def describe(app: FastAPI) -> None:
    """Add the schemas that the routes refer to."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = original()
            _, found = models_json_schema(
                [(CompletionRequest, "validation"), (ChatRequest, "validation")], ref_template=_REF
            )
            schemas = description.setdefault("components", {}).setdefault("schemas", {})
            schemas |= found["$defs"] | {"Error": _ERROR}
            # What FastAPI would say of a path that it cannot read; ours are all readable.
            description["paths"]["/v1/models/{name}"]["get"]["responses"].pop("422", None)
            app.openapi_schema = description
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
