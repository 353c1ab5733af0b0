"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, Any

from trimtab.serving import logprobs, prompts
from trimtab.serving.call import Call, Chunks
from trimtab.serving.errors import ApiError, dump
from trimtab.serving.protocol import ChatRequest

if TYPE_CHECKING:
    from trimtab.engine.request import Completion, RequestOutput
    from trimtab.serving.ticket import Ticket, Update
    from trimtab.serving.tools import Delta, ToolParser, ToolPlan


class ChatCall(Call[ChatRequest]):
    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    body_type = ChatRequest
    prompt_field = "messages"

    async def prepare(self) -> None:
        body = self.body
        wish = body.wish()
        if self.served.tokenizer is None:
            raise ApiError(
                400, "this model has no tokenizer, so it cannot chat; use /v1/completions with token ids"
            )
        # In a thread: templates and tool schemas take milliseconds, which other streams would feel.
        self.plan, self.text = await asyncio.to_thread(self._rendered)
        changes: dict[str, Any] = {"max_tokens": body.max_completion_tokens or body.max_tokens}
        if self.plan is not None:
            self.notes += self.plan.notes
            if self.plan.wish is not None and wish is not None:
                raise ApiError(
                    400,
                    "tools that may be called cannot be combined with response_format or structured_outputs; "
                    "leave one of them out or set tool_choice to 'none'",
                    param="tools",
                )
            if self.plan.wish is not None and body.stop:
                raise ApiError(
                    400,
                    "stop cannot be combined with tools that may be called, whose calls it could cut short; "
                    "leave one of them out or set tool_choice to 'none'",
                    param="stop",
                )
            wish = wish or self.plan.wish
            if not self.plan.skip_special_tokens:
                changes["skip_special_tokens"] = False
        if body.logprobs:
            changes["logprobs"] = body.top_logprobs or 0
        self.params = [body.sampling(wish, **changes)]
        self.prompts = await prompts.encode(self.served, [self.text], add_special_tokens=False)
        prompts.check_room(self.served, self.prompts, changes["max_tokens"], "messages")

    def _rendered(self) -> tuple[ToolPlan | None, str]:
        """What the tools ask for, and the conversation as the model reads it."""
        body, tokenizer = self.body, self.served.tokenizer
        assert tokenizer is not None
        messages = [message.plain() for message in body.messages]
        plan = None
        if self._speaks_of_tools:
            from trimtab.serving import tools

            plan = tools.prepare(
                None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools],
                body.tool_choice,
                body.parallel_tool_calls,
                tools.template_source(tokenizer, with_tools=body.tools is not None),
                tokenizer,
                self.served.tool_format,
            )
            messages = plan.messages(messages)
        variables = dict(body.chat_template_kwargs or {})
        reserved = [name for name in _RESERVED if name in variables]
        if reserved:
            raise ApiError(
                400,
                f"chat_template_kwargs has {reserved[0]}, which templates do not get from there; drop it",
                param="chat_template_kwargs",
            )
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            tools=plan.template_tools if plan is not None else None,
            continue_final_message=bool(body.continue_final_message),
            **variables,
        )
        return plan, text

    @property
    def _speaks_of_tools(self) -> bool:
        body = self.body
        asked = (body.tools, body.tool_choice, body.parallel_tool_calls)
        return any(value is not None for value in asked) or any(
            message.tool_calls or message.role == "tool" for message in body.messages
        )

    def parser(self) -> ToolParser | None:
        return self.plan.parser() if self.plan is not None else None

    def prompt_text(self) -> str:
        return self.text

    def answer(self, ticket: Ticket, outputs: list[RequestOutput]) -> dict[str, Any]:
        (output,) = outputs
        choices = [self._choice(completion) for completion in output.outputs]
        self.reasons = {choice["index"]: choice["finish_reason"] for choice in choices}
        answer = self.head(self.object) | {"choices": choices}
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = logprobs.prompt(self.served.texts, output.prompt_logprobs or [])
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer | self.tail(ticket)

    def _choice(self, completion: Completion) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        reason = completion.finish_reason
        parser = self.parser()
        if parser is not None:
            parser.push(completion.text)
            parsed = parser.finish(reason)
            message["content"], reason = parsed.content, parsed.finish_reason
            if parsed.tool_calls:
                message["tool_calls"] = [call.to_openai() for call in parsed.tool_calls]
            elif parsed.content is None:
                message["content"] = ""
        found = completion.logprobs
        choice: dict[str, Any] = {"index": completion.index, "message": message}
        choice["logprobs"] = None if found is None else logprobs.chat(self.served.texts, found)
        choice |= {"finish_reason": reason, "stop_reason": completion.stop_reason}
        if self.body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def chunks(self, ticket: Ticket) -> ChatChunks:
        return ChatChunks(self, ticket)


_RESERVED = (
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
)


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
