"""One generation request on its way: what is asked of the engine, and how the answer is told.

`Call` is what completions and chats have in common. `Chunks` writes a stream's chunks as bytes: what does not
change from chunk to chunk is written once, since this runs for every stream after every step of the engine.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from trimtab.serving.errors import ApiError, dump
from trimtab.serving.extras import extras, usage
from trimtab.serving.observe import RequestRecord
from trimtab.serving.protocol import GenerationRequest

if TYPE_CHECKING:
    from trimtab.decoding.sampling_params import SamplingParams
    from trimtab.engine.request import RequestOutput
    from trimtab.serving.models import ServedModel
    from trimtab.serving.ticket import Ticket, Update

RequestBody = TypeVar("RequestBody", bound=GenerationRequest)
DONE = b"data: [DONE]\n\n"


class Call(ABC, Generic[RequestBody]):
    """A request that was understood.

    Attributes:
        prompts, params: what the engine is asked, one of each a prompt; set by `prepare`.
        notes: for the `trimtab` object, sentences about how the request was met.
        reasons: why texts ended, as the client is told.
    """

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]
    body_type: ClassVar[type[GenerationRequest]]
    prompt_field: ClassVar[str]

    def __init__(self, id: str, body: RequestBody, served: ServedModel) -> None:
        self.id = id
        self.body = body
        self.served = served
        self.created = int(time.time())
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.notes: list[str] = []
        self.reasons: dict[int, str | None] = {}

    @classmethod
    def new_id(cls) -> str:
        return f"{cls.prefix}-{secrets.token_hex(12)}"

    @abstractmethod
    async def prepare(self) -> None:
        """Find prompts and parameters. Raises ApiError or RequestError."""

    @abstractmethod
    def answer(self, ticket: Ticket, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The body of the response."""

    @abstractmethod
    def chunks(self, ticket: Ticket) -> Chunks[Any]:
        """The writer of the stream."""

    @abstractmethod
    def prompt_text(self) -> str:
        """What the model was given, as text."""

    @property
    def prompt_count(self) -> int:
        return 1

    @property
    def n(self) -> int:
        """Texts that are returned for each prompt."""
        return self.body.n or 1

    @property
    def is_heavy(self) -> bool:
        """Whether telling the answer takes long enough to hold other streams up."""
        return any(p.logprobs is not None or p.prompt_logprobs is not None for p in self.params)

    def check_number(self, most: int) -> None:
        """Raise ApiError where the request asks for too many texts."""
        texts = self.prompt_count * self.body.samples
        if texts > most:
            raise ApiError(
                400,
                f"this request asks for {texts} texts (prompts times n or best_of), and at most {most} are "
                "made for one request; ask for fewer",
                param=self.prompt_field
                if self.body.samples == 1
                else "best_of"
                if self.body.best_of
                else "n",
            )

    def head(self, object: str) -> dict[str, Any]:
        """What every answer and chunk begins with."""
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }

    def tail(self, ticket: Ticket) -> dict[str, Any]:
        """What an answer ends with: the counts, as they are now, and the `trimtab` object."""
        return {"usage": self.usage(ticket), "trimtab": extras(ticket, self.served, self.all_notes(ticket))}

    def usage(self, ticket: Ticket) -> dict[str, Any]:
        return usage(ticket)

    def all_notes(self, ticket: Ticket) -> list[str]:
        form = ticket.requests[0].form
        return self.notes + list(form.constraint.notes if form is not None else ())

    def describe(self, record: RequestRecord) -> None:
        """Tell a record what is known before the request runs."""
        record.model, record.stream = self.served.name, bool(self.body.stream)
        record.read_prompt = self.prompt_text


class Chunks(ABC, Generic[RequestBody]):
    """Writes the chunks of one stream."""

    def __init__(self, call: Call[RequestBody], ticket: Ticket) -> None:
        options = call.body.stream_options
        self._call = call
        self._ticket = ticket
        self._n = call.n
        self._continuous = bool(options and options.continuous_usage_stats)
        self._usage = bool(options and options.include_usage)
        self._left = len(ticket.requests)
        self._begin = "data: " + dump(call.head(call.chunk_object)).decode()[:-1] + ',"choices":['
        self._end = '],"usage":null}\n\n' if self._usage else "]}\n\n"
        self._begun: set[int] = set()

    def write(self, updates: list[Update]) -> bytes:
        """The chunks for what has come, perhaps none."""
        end = self._end
        if self._continuous:
            end = "]," + dump(self._call.tail(self._ticket)).decode()[1:] + "\n\n"
        out: list[str] = []
        for update in updates:
            if update.finish_reason == "error":
                continue  # the ticket raises what went wrong
            index = update.prompt_index * self._n + update.index
            if index not in self._begun:
                self._begun.add(index)
                self.first(index, update, out, end)
            self.more(index, update, out, end)
            if update.finish_reason is not None:
                self._left -= 1
                last = end
                if not self._left and not self._usage and not self._continuous:
                    tail = extras(self._ticket, self._call.served, self._call.all_notes(self._ticket))
                    last = f'],"trimtab":{dump(tail).decode()}}}\n\n'
                self.last(index, update, out, end, last)
        return "".join(out).encode()

    def finish(self) -> bytes:
        """What follows the last choice."""
        if not self._usage:
            return DONE
        head = self._call.head(self._call.chunk_object) | {"choices": []}
        return b"data: " + dump(head | self._call.tail(self._ticket)) + b"\n\n" + DONE

    def event(self, choice: str, end: str, more: str = "") -> str:
        """One chunk: a choice as JSON, and further fields of the chunk itself."""
        return f"{self._begin}{choice}]{more}{end[1:]}" if more else f"{self._begin}{choice}{end}"

    def first(self, index: int, update: Update, out: list[str], end: str) -> None:
        """What comes before a choice's first text."""

    @abstractmethod
    def more(self, index: int, update: Update, out: list[str], end: str) -> None:
        """A choice's next text."""

    @abstractmethod
    def last(self, index: int, update: Update, out: list[str], end: str, last: str) -> None:
        """A choice's end; `last` is the end of its last chunk."""
