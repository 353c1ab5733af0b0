"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from trimtab.serving import logprobs, prompts
from trimtab.serving.call import Call
from trimtab.serving.chat_chunks import ChatChunks
from trimtab.serving.errors import ApiError
from trimtab.serving.protocol import ChatRequest

if TYPE_CHECKING:
    from trimtab.engine.request import Completion, RequestOutput
    from trimtab.serving.ticket import Ticket
    from trimtab.serving.tools import ToolParser, ToolPlan

# Arguments of the template call itself, not variables of a template.
_RESERVED = (
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
)


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
