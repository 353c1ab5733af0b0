"""`POST /v1/completions`."""

from __future__ import annotations

from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, Any

from trimtab.serving import logprobs, prompts
from trimtab.serving.call import Call, Chunks
from trimtab.serving.errors import dump
from trimtab.serving.protocol import CompletionRequest

if TYPE_CHECKING:
    from trimtab.engine.request import Completion, Request, RequestOutput
    from trimtab.serving.ticket import Ticket, Update
    from trimtab.serving.token_texts import Offsets

MAX_TOKENS = 16  # OpenAI's default


class CompletionCall(Call[CompletionRequest]):
    prefix = "cmpl"
    object = chunk_object = "text_completion"
    body_type = CompletionRequest
    prompt_field = "prompt"

    @property
    def prompt_count(self) -> int:
        return len(_as_list(self.body.prompt))

    async def prepare(self) -> None:
        body = self.body
        wish = body.wish()
        # Parameters first: they are cheap to check, prompts may be long.
        body.sampling(wish, max_tokens=body.max_tokens or MAX_TOKENS)
        self._texts: list[str | list[int]] = _as_list(body.prompt)
        self.prompts = await prompts.encode(self.served, self._texts)
        asked = 1 if self.scores_only else body.max_tokens
        prompts.check_room(self.served, self.prompts, asked, "prompt")
        changes: dict[str, Any] = {"logprobs": body.logprobs}
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            changes["prompt_logprobs"] = body.logprobs
        endless = self.served.engine.cache.endless
        for ids in self.prompts:
            room = MAX_TOKENS if endless else min(MAX_TOKENS, self.served.context - len(ids))
            changes["max_tokens"] = asked or room
            self.params.append(body.sampling(wish, **changes))

    @property
    def scores_only(self) -> bool:
        """`max_tokens: 0` with `echo`: only the prompt is told. One token is drawn and dropped."""
        return self.body.max_tokens == 0

    @property
    def skips_special(self) -> bool:
        return self.body.skip_special_tokens is not False

    def prompt_text(self) -> str:
        return "\n".join(self.echoed(i) for i in range(len(self._texts)))

    def echoed(self, prompt_index: int) -> str:
        """A prompt as `echo` repeats it."""
        prompt = self._texts[prompt_index]
        return prompt if isinstance(prompt, str) else prompts.decode(self.served, prompt, self.skips_special)

    def usage(self, ticket: Ticket) -> dict[str, Any]:
        counts = super().usage(ticket)
        if self.scores_only:
            counts |= {"completion_tokens": 0, "total_tokens": counts["prompt_tokens"]}
        return counts

    def answer(self, ticket: Ticket, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices = []
        for i, output in enumerate(outputs):
            for completion in output.outputs:
                choices.append(self._choice(len(choices), i, output, completion))
        self.reasons = {choice["index"]: choice["finish_reason"] for choice in choices}
        return self.head(self.object) | {"choices": choices} | self.tail(ticket)

    def _choice(
        self, index: int, prompt_index: int, output: RequestOutput, completion: Completion
    ) -> dict[str, Any]:
        body, ids, text = self.body, completion.token_ids, completion.text
        reason, stop_reason, found = completion.finish_reason, completion.stop_reason, completion.logprobs
        if self.scores_only:
            ids, text, reason, stop_reason, found = [], "", "length", None, [] if found is not None else None
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        choice |= {"finish_reason": reason, "stop_reason": stop_reason}
        if body.echo:
            choice["text"] = self.echoed(prompt_index) + text
        if found is not None:
            offsets = self.served.texts.offsets(self.skips_special)
            all_ids, all_found = ids, list(found)
            if body.echo:
                all_ids = output.prompt_token_ids + ids
                all_found = list(output.prompt_logprobs or []) + all_found
            choice["logprobs"] = logprobs.legacy(self.served.texts, all_found, all_ids, offsets.take(all_ids))
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.prompt(self.served.texts, output.prompt_logprobs or [])
        if body.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": ids}
        return choice

    def chunks(self, ticket: Ticket) -> CompletionChunks:
        return CompletionChunks(self, ticket)


class CompletionChunks(Chunks[CompletionRequest]):
    """The chunks of a streamed completion; a choice's reason to end comes with its last text."""

    _call: CompletionCall

    def __init__(self, call: CompletionCall, ticket: Ticket) -> None:
        super().__init__(call, ticket)
        self._offsets: dict[int, Offsets] = {}
        body = call.body
        self._plain = body.logprobs is None and not body.return_token_ids and not call.scores_only

    def first(self, index: int, update: Update, out: list[str], end: str) -> None:
        call, body = self._call, self._call.body
        request = self._ticket.groups[update.prompt_index][update.index]
        ids = request.tokens[: request.prompt_length]
        more: dict[str, Any] = {}
        if body.prompt_logprobs is not None:
            more["prompt_logprobs"] = logprobs.prompt(call.served.texts, request.prompt_logprobs)
        if body.return_token_ids:
            more["prompt_token_ids"] = ids
        if body.logprobs is not None:
            self._offsets[index] = call.served.texts.offsets(call.skips_special)
        if body.echo or more:
            text = call.echoed(update.prompt_index) if body.echo else ""
            found = self._echoed_logprobs(index, request, ids) if body.echo else None
            choice = {"index": index, "text": text, "logprobs": found, "finish_reason": None}
            out.append(self.event(dump(choice | more).decode(), end))

    def _echoed_logprobs(self, index: int, request: Request, ids: list[int]) -> dict[str, Any] | None:
        if self._call.body.logprobs is None:
            return None
        offsets = self._offsets[index].take(ids)
        return logprobs.legacy(self._call.served.texts, request.prompt_logprobs, ids, offsets)

    def more(self, index: int, update: Update, out: list[str], end: str) -> None:
        if update.finish_reason is not None:
            return  # told with the end
        if self._plain:
            if update.text:
                out.append(
                    f'{self._begin}{{"index":{index},"text":{quoted(update.text)},'
                    f'"logprobs":null,"finish_reason":null}}{end}'
                )
        elif not self._call.scores_only and (update.text or update.token_ids):
            out.append(self.event(dump(self._choice(index, update)).decode(), end))

    def last(self, index: int, update: Update, out: list[str], end: str, last: str) -> None:
        choice = self._choice(index, update)
        self._call.reasons[index] = choice["finish_reason"]
        out.append(self.event(dump(choice).decode(), last))

    def _choice(self, index: int, update: Update) -> dict[str, Any]:
        call = self._call
        if call.scores_only:
            return {"index": index, "text": "", "logprobs": None, "finish_reason": "length"}
        choice: dict[str, Any] = {"index": index, "text": update.text, "logprobs": None}
        choice["finish_reason"] = update.finish_reason
        if update.finish_reason is not None:
            choice["stop_reason"] = update.stop_reason
        if update.logprobs is not None:
            offsets = self._offsets[index].take(update.token_ids)
            choice["logprobs"] = logprobs.legacy(
                call.served.texts, update.logprobs, update.token_ids, offsets
            )
        if call.body.return_token_ids:
            choice["token_ids"] = update.token_ids
        return choice


def _as_list(prompt: Any) -> list[str | list[int]]:
    """One prompt or several: a text, a list of ids, or a list of either."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)
