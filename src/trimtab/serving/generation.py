"""The way of a generation request through the server, the same for both routes."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from trimtab.serving.errors import CLIENT_GONE, ApiError, json_response, to_api_error
from trimtab.serving.extras import cached_tokens, queue_s, ttft_s
from trimtab.serving.guard import Guard
from trimtab.serving.observe import Observer, RequestRecord, gaps, tell
from trimtab.serving.parsing import parse
from trimtab.serving.sse import EventStream

if TYPE_CHECKING:
    from trimtab.serving.call import Call
    from trimtab.serving.models import Models
    from trimtab.serving.settings import ServerSettings
    from trimtab.serving.ticket import Ticket
    from trimtab.serving.worker import Worker


class Generator:
    """Answers generation requests with what the worker's engines say."""

    def __init__(
        self, worker: Worker, models: Models, settings: ServerSettings, observers: list[Observer]
    ) -> None:
        self._worker = worker
        self._models = models
        self._settings = settings
        self._observers = observers

    async def answer(self, request: Request, kind: type[Call[Any]]) -> Response:
        """The response to one request, errors included; a stream goes on after this returns."""
        began = time.perf_counter()
        id = kind.new_id()
        client = request.client.host if request.client is not None else None
        record = RequestRecord(id=id, route=request.scope["route"].path, client=client)
        ticket: Ticket | None = None
        try:
            call = await self._understand(request, kind, id, record)
            ticket = await self._worker.submit(
                call.served.engine_name,
                call.prompts,
                call.params,
                live=bool(call.body.stream),
                interval_s=self._settings.stream_interval,
            )
            if call.body.stream:
                return self._stream(call, ticket, record, began)
            return await self._whole(request, call, ticket, record, began)
        except ClientDisconnect:
            if ticket is not None:
                ticket.cancel()
            self._ended(record, began, None, ticket, None, True)
            return Response(status_code=CLIENT_GONE)
        except Exception as failure:
            if ticket is not None:
                ticket.cancel()
            error = to_api_error(failure)
            error.param = _own_param(error, kind)
            self._ended(record, began, None, ticket, error, False)
            return error.response(id)

    async def _understand(
        self, request: Request, kind: type[Call[Any]], id: str, record: RequestRecord
    ) -> Call[Any]:
        # Also keeps web pages of other origins out: only this type makes a browser ask before it sends.
        type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if type != "application/json":
            raise ApiError(415, "the body must be JSON; send the header 'Content-Type: application/json'")
        body = parse(kind.body_type, await request.body())
        record.model, record.stream = body.model[:200], bool(body.stream)
        served = self._models.get(body.model)
        body.check()
        call = kind(id, body, served)
        call.check_number(self._settings.max_n)
        await call.prepare()
        call.describe(record)
        return call

    async def _whole(
        self, request: Request, call: Call[Any], ticket: Ticket, record: RequestRecord, began: float
    ) -> Response:
        guard = self._guard(ticket, request, began)
        try:
            outputs = await ticket.wait()
        except asyncio.CancelledError:
            if guard.gone:
                raise ClientDisconnect from None
            if guard.late:
                raise guard.error from None
            raise
        finally:
            guard.stop()
            ticket.cancel()
        if call.is_heavy:
            content = await asyncio.to_thread(call.answer, ticket, outputs)
        else:
            content = call.answer(ticket, outputs)
        response = json_response(content, headers={"X-Request-Id": call.id})
        self._ended(record, began, call, ticket, None, False)
        return response

    def _stream(self, call: Call[Any], ticket: Ticket, record: RequestRecord, began: float) -> Response:
        return EventStream(
            ticket,
            call.chunks(ticket),
            lambda receive: self._guard(ticket, receive, began),
            lambda error, gone: self._ended(record, began, call, ticket, error, gone),
            {"X-Request-Id": call.id},
        )

    def _guard(self, ticket: Ticket, connection: Any, began: float) -> Guard:
        limit = self._settings.request_timeout
        left = None if limit is None else limit - (time.perf_counter() - began)
        receive = connection.receive if isinstance(connection, Request) else connection
        return Guard(ticket, receive, left, limit)

    def _ended(
        self,
        record: RequestRecord,
        began: float,
        call: Call[Any] | None,
        ticket: Ticket | None,
        error: ApiError | None,
        gone: bool,
    ) -> None:
        """Complete the record and hand it to the observers."""
        record.total_s = time.perf_counter() - began
        if ticket is not None and ticket.groups:
            metrics = ticket.metrics
            usage = {} if call is None else call.usage(ticket)
            record.prompt_tokens = sum(group[0].metrics.prompt_tokens for group in ticket.groups)
            generated = sum(len(one.token_times) for one in metrics)
            record.completion_tokens = usage.get("completion_tokens", generated)
            record.cached_tokens = cached_tokens(ticket)
            record.queue_s, record.ttft_s = queue_s(metrics), ttft_s(metrics)
            record.inter_token_s = gaps(metrics)
            reasons = [request.finish_reason or "cancelled" for request in ticket.requests]
            if call is not None and len(call.reasons) == len(reasons):
                reasons = [reason or "cancelled" for _, reason in sorted(call.reasons.items())]
            record.finish_reasons = reasons
        if gone:
            record.status = CLIENT_GONE
        elif error is not None:
            record.error = error.message
            if not (record.stream and call is not None):
                record.status = error.status
        tell(self._observers, record)


def _own_param(error: ApiError, kind: type[Call[Any]]) -> str | None:
    """The field that an error is about, as this route calls it; None where it is none of its fields."""
    if error.param == "prompt":
        return kind.prompt_field
    if error.code is not None or error.param is None:
        return error.param
    return error.param if re.split(r"[.\[]", error.param)[0] in kind.body_type.model_fields else None
