"""What goes wrong, as OpenAI's clients expect to be told: a status and `{"error": {...}}`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from trimtab.errors import NumericsError, RequestError
from trimtab.serving.worker import EngineFailure, NotServing, Overloaded

log = logging.getLogger("trimtab.serving")

CLIENT_GONE = 499  # what logs and metrics call a client that left; nobody receives it
_FIRST_WORD = re.compile(r"[a-z][a-z_]*(\.[a-z_]+|\[\d+\])*")
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable", 504: "timeout_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: the HTTP status.
        message: one clear sentence.
        param: the request's field it is about, such as `messages[0].role`.
        code: OpenAI's word for it, where it has one.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = _TYPES.get(status, "invalid_request_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, request_id: str | None = None) -> Response:
        headers = self.headers | ({"X-Request-Id": request_id} if request_id else {})
        return json_response(self.body, self.status, headers)


def to_api_error(error: BaseException) -> ApiError:
    """The answer to any failure; what is not the client's doing is logged with its traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(error.retry_after_s)}
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=headers)
    if isinstance(error, NotServing):
        return ApiError(503, str(error), code="not_ready", headers={"Retry-After": "1"})
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=_param_of(str(error)))
    if isinstance(error, NumericsError | EngineFailure):  # the worker has logged it
        return ApiError(500, str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed on this request ({type(error).__name__}); its log says more")


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump(content), status, dict(headers or {}), "application/json")


def dump(content: Any) -> bytes:
    """Compact JSON. Raises ValueError for numbers that JSON does not know."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _param_of(message: str) -> str | None:
    """The field that an error of the library names: its sentences begin with it."""
    if message.startswith(("the prompt ", "a prompt ")):
        return "prompt"
    first = message.split(" ", 1)[0]
    looks = _FIRST_WORD.fullmatch(first) and first not in ("the", "a", "this", "there", "no", "an")
    return first if looks else None
