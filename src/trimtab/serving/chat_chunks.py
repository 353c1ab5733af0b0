"""The chunks of a streamed chat."""

from __future__ import annotations

from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, Any

from trimtab.serving import logprobs
from trimtab.serving.call import Chunks
from trimtab.serving.errors import dump
from trimtab.serving.protocol import ChatRequest

if TYPE_CHECKING:
    from trimtab.serving.chat import ChatCall
    from trimtab.serving.ticket import Ticket, Update
    from trimtab.serving.tools import Delta, ToolParser


class ChatChunks(Chunks[ChatRequest]):
    """The chunks of a streamed chat: for each choice its role, its words, and why it ended."""

    _call: ChatCall

    def __init__(self, call: ChatCall, ticket: Ticket) -> None:
        super().__init__(call, ticket)
        self._parsers: dict[int, ToolParser | None] = {}
        self._plain = call.plan is None and not call.body.logprobs and not call.body.return_token_ids

    def first(self, index: int, update: Update, out: list[str], end: str) -> None:
        call = self._call
        self._parsers[index] = call.parser()
        request = self._ticket.groups[0][index]
        more: dict[str, Any] = {}
        if call.body.prompt_logprobs is not None:
            more["prompt_logprobs"] = logprobs.prompt(call.served.texts, request.prompt_logprobs)
        if call.body.return_token_ids:
            more["prompt_token_ids"] = request.tokens[: request.prompt_length]
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        choice["finish_reason"] = None
        out.append(self.event(dump(choice).decode(), end, "," + dump(more).decode()[1:-1] if more else ""))

    def more(self, index: int, update: Update, out: list[str], end: str) -> None:
        if self._plain:
            if update.text:
                out.append(
                    f'{self._begin}{{"index":{index},"delta":{{"content":{quoted(update.text)}}},'
                    f'"logprobs":null,"finish_reason":null}}{end}'
                )
            return
        parser = self._parsers[index]
        deltas = _deltas(parser.push(update.text)) if parser is not None else []
        if parser is None and update.text:
            deltas = [{"content": update.text}]
        reports = bool(update.logprobs) or (self._call.body.return_token_ids and bool(update.token_ids))
        if reports and not deltas:
            deltas = [{"content": ""}]
        for i, delta in enumerate(deltas):
            choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            # What is told of the tokens goes with the first piece that they became.
            if update.logprobs and i == 0:
                choice["logprobs"] = logprobs.chat(self._call.served.texts, update.logprobs)
            if self._call.body.return_token_ids:
                choice["token_ids"] = update.token_ids if i == 0 else []
            out.append(self.event(dump(choice).decode(), end))

    def last(self, index: int, update: Update, out: list[str], end: str, last: str) -> None:
        reason = update.finish_reason
        parser = self._parsers[index]
        if parser is not None:
            parsed = parser.finish(reason)
            reason = parsed.finish_reason
            for delta in _deltas(parsed.deltas):
                choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                out.append(self.event(dump(choice).decode(), end))
        self._call.reasons[index] = reason
        final: dict[str, Any] = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
        final["stop_reason"] = update.stop_reason
        out.append(self.event(dump(final).decode(), last))


def _deltas(found: list[Delta]) -> list[dict[str, Any]]:
    return [delta.to_openai() for delta in found]
