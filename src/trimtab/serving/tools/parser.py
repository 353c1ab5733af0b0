"""From generated text, as it arrives, to content and tool calls.

However the text is cut into pieces, the joined deltas are the same. Content never holds markup: what could
be the beginning of a trigger is held back until it is known. A call is announced with its name as soon as
that is complete; its arguments follow as the JSON text that was generated.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Final

from trimtab.serving.tools.answer import Delta, Parsed, ToolCall
from trimtab.serving.tools.formats import ToolFormat
from trimtab.serving.tools.matching import first, held_back, match, spaces

_STRUCTURE: Final = re.compile(r'[{}\[\]"\\]')
_HEAD: Final = ("{", '"name"', ":")
_NAME: Final = re.compile(r'"([a-zA-Z0-9_-]*)("?)')


class ToolParser:
    """Reads one answer. `push(text)` returns the deltas that became certain, `finish` the rest and the whole.

    Args:
        form: the format of the calls; None: all text is content.
        drop: texts of end tokens, left out of the content.
        arguments_of: the whole text is the arguments of this function, without any markup.
        stop_reason_kept: a finished answer keeps its reason `stop`, as OpenAI has it for a named function.
    """

    def __init__(
        self,
        form: ToolFormat | None,
        drop: Sequence[str] = (),
        arguments_of: str | None = None,
        stop_reason_kept: bool = False,
    ) -> None:
        self._form = form
        self._drop = tuple(drop)
        self._keep_reason = stop_reason_kept
        self._held = ""
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._arguments: list[str] = []
        self._deltas: list[Delta] = []
        self._depth = 0
        self._in_string = self._escaped = False
        self._bare_arguments = arguments_of is not None
        self._step: Callable[[bool], bool] = self._start if form is not None and form.bare else self._free
        if arguments_of is not None:
            self._step = self._in_arguments
            self._begin_call(arguments_of)

    def push(self, text: str) -> list[Delta]:
        """Take more text; returns what is certain now."""
        self._held += text
        self._run(last=False)
        return self._taken()

    def finish(self, finish_reason: str | None) -> Parsed:
        """The text ended for this reason; call once."""
        self._run(last=True)
        self._end_arguments()
        if self._calls and finish_reason == "stop" and self._calls[-1].complete and not self._keep_reason:
            finish_reason = "tool_calls"
        content = "".join(self._content) or None
        return Parsed(content, self._calls, finish_reason, self._taken())

    def _run(self, last: bool) -> None:
        # A step returns False where it needs more text; after the last one it takes what there is.
        while self._held and self._step(last):
            pass

    def _taken(self) -> list[Delta]:
        taken, self._deltas = self._deltas, []
        return taken

    # Steps. Each takes from the held text's beginning; False: it needs more text, or has taken all.

    def _start(self, last: bool) -> bool:
        """Where a message may begin with a call's own JSON."""
        matched = match(self._held, _HEAD)
        if matched is None and not last:
            return False
        return self._go(self._in_head if matched else self._free, 0)

    def _free(self, last: bool) -> bool:
        trigger = self._form.trigger if self._form is not None else ""
        marks = tuple(mark for mark in (trigger, *self._drop) if mark)
        at, mark = first(self._held, marks)
        if mark == trigger != "":
            # Blanks before a call are no content.
            self._say(self._held[:at] if self._content or self._held[:at].strip() else "")
            return self._go(self._opened, at)
        if mark:
            self._say(self._held[:at])
            return self._go(self._free, at + len(mark))
        keep = 0 if last else held_back(self._held, marks)
        cut = len(self._held) - keep
        if trigger and not last and not self._content and not self._held[:cut].strip():
            return False
        self._say(self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _opened(self, last: bool) -> bool:
        assert self._form is not None
        used = match(self._held, self._form.opening)
        if used is None:
            return self._wait(last)
        if used:
            return self._go(self._in_head, used)
        # The trigger alone, with something else behind it, is text like any other.
        self._say(self._form.trigger)
        return self._go(self._free, len(self._form.trigger))

    def _in_head(self, last: bool) -> bool:
        """`{"name": NAME`: a call is announced once this is whole; what is no call becomes content."""
        used = match(self._held, _HEAD)
        if used:
            used = spaces(self._held, used)
            found = _NAME.match(self._held, used)
            if found is not None and found[2]:
                self._begin_call(found[1])
                return self._go(self._to_arguments, found.end())
            if used == len(self._held) or (found is not None and found.end() == len(self._held)):
                return self._wait(last)
        return self._wait(last) if used is None else self._go(self._free, 0)

    def _to_arguments(self, last: bool) -> bool:
        assert self._form is not None
        used = match(self._held, (",", json.dumps(self._form.arguments_key), ":", "{"))
        if used is None:
            return self._wait(last)
        return self._go(self._in_arguments, used - 1) if used else self._go(self._broken, 0)

    def _in_arguments(self, last: bool) -> bool:
        text, at = self._held, 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = _STRUCTURE.search(text, at)
            if found is None:
                break
            at, sign = found.end(), found[0]
            if self._in_string:
                self._in_string = sign != '"'
                self._escaped = sign == "\\"
            elif sign == '"':
                self._in_string = True
            else:
                self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(sign, 0)
                if self._depth == 0:
                    self._say_arguments(text[:at])
                    self._calls[-1].complete = self._bare_arguments
                    return self._go(self._over if self._bare_arguments else self._after_arguments, at)
        self._say_arguments(text)
        self._held = ""
        return False

    def _after_arguments(self, last: bool) -> bool:
        used = match(self._held, ("}",))
        if used == 0 and self._form is not None and self._form.short_ids:
            own = match(self._held, (",", '"id"', ":", '"'))
            if own is None:
                return self._wait(last)
            if own:
                return self._go(self._in_own_id, own)
        if used is None:
            return self._wait(last)
        self._calls[-1].complete = used > 0
        return self._go(self._after_call if used else self._over, used)

    def _in_own_id(self, last: bool) -> bool:
        """An id that the model wrote: the call was announced with another, so this one is dropped."""
        at = self._held.find('"')
        if at >= 0:
            return self._go(self._after_arguments, at + 1)
        self._held = ""
        return False

    def _after_call(self, last: bool) -> bool:
        """Another call, or the end of the run."""
        assert self._form is not None
        again = match(self._held, self._form.between)
        if again is None:
            return self._wait(last)
        return self._go(self._in_head if again else self._over, again)

    def _over(self, last: bool) -> bool:
        """What follows a run of calls is its closing and the end token; the grammar allows nothing else."""
        self._held = ""
        return False

    def _broken(self, last: bool) -> bool:
        """A call whose name was announced goes on unlike a call: the rest is handed out as it is."""
        self._say_arguments(self._held)
        self._held = ""
        return False

    # What the steps do.

    def _go(self, step: Callable[[bool], bool], used: int) -> bool:
        self._step, self._held = step, self._held[used:]
        return True

    def _wait(self, last: bool) -> bool:
        """For more text; at the end, half a markup is dropped."""
        if last:
            self._held = ""
        return False

    def _say(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._deltas.append(Delta(content=text))

    def _say_arguments(self, text: str) -> None:
        if text:
            self._arguments.append(text)
            self._deltas.append(Delta(index=len(self._calls) - 1, arguments=text))

    def _begin_call(self, name: str) -> None:
        self._end_arguments()
        short = self._form is not None and self._form.short_ids
        call = ToolCall(secrets.token_hex(5)[:9] if short else f"call_{secrets.token_hex(12)}", name)
        self._calls.append(call)
        self._deltas.append(Delta(index=len(self._calls) - 1, id=call.id, name=name))

    def _end_arguments(self) -> None:
        if self._calls:
            self._calls[-1].arguments += "".join(self._arguments)
            self._arguments.clear()
