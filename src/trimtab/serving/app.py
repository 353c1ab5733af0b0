"""The application: routes, and what they share in `app.state`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from trimtab import __version__
from trimtab.serving.chat import ChatCall
from trimtab.serving.completions import CompletionCall
from trimtab.serving.errors import ApiError, json_response, to_api_error
from trimtab.serving.generation import Generator
from trimtab.serving.models import Models
from trimtab.serving.openapi import describe, failure, request_body
from trimtab.serving.protocol import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from trimtab.serving.observe import Observer
    from trimtab.serving.settings import ServerSettings
    from trimtab.serving.worker import Worker


def create_app(worker: Worker, settings: ServerSettings) -> FastAPI:
    """The OpenAI-compatible API over a worker; starting and stopping the worker is the caller's.

    `app.state.observers` is a list of functions that are told of every finished request (`observe.py`);
    append to it.
    """
    app = FastAPI(title="trimtab", version=__version__, docs_url=None, redoc_url=None)
    observers: list[Observer] = []
    models = Models(worker, settings.tool_format)
    generator = Generator(worker, models, settings, observers)
    app.state.observers, app.state.models, app.state.worker = observers, models, worker

    @app.get("/health", tags=["server"], responses={503: {"description": "no requests are taken"}})
    async def health() -> Response:
        """200 while requests are taken, 503 otherwise."""
        if worker.ready:
            return json_response({"status": "ok"})
        return json_response({"status": "unavailable"}, 503)

    @app.get("/v1/models", tags=["models"], responses=failure("401"))
    async def list_models() -> Response:
        """The served models."""
        return json_response(models.cards())

    @app.get("/v1/models/{name:path}", tags=["models"], responses=failure("401", "404"))
    async def get_model(name: str) -> Response:
        """One served model."""
        try:
            return json_response(models.get(name).card())
        except ApiError as error:
            return error.response()

    @app.post("/v1/completions", tags=["generation"], openapi_extra=request_body(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Go on with a text."""
        return await generator.answer(request, CompletionCall)

    @app.post("/v1/chat/completions", tags=["generation"], openapi_extra=request_body(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answer in a conversation."""
        return await generator.answer(request, ChatCall)

    async def http_error(request: Request, error: Any) -> Response:
        """A route that does not exist, or a method that it does not know."""
        if error.status_code == 404:
            failure = ApiError(404, f"there is no {request.url.path[:200]} here", code="not_found")
        elif error.status_code == 405:
            message = f"{request.url.path[:200]} does not take {request.method}"
            failure = ApiError(405, message, code="method_not_allowed", headers=error.headers)
        else:
            failure = ApiError(error.status_code, str(error.detail), headers=error.headers)
        return failure.response()

    async def bug(request: Request, error: Exception) -> Response:
        return to_api_error(error).response()

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, bug)
    if settings.playground:
        from trimtab.serving.playground.page import router

        app.include_router(router)
    describe(app)
    return app
