"""`trimtab chat`: a conversation with history, at the keyboard or from a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import common
from trimtab.errors import TrimtabError, did_you_mean

if TYPE_CHECKING:
    from trimtab import Engine, SamplingParams

HELP = """\
/help            this text
/system TEXT     set the system message (no TEXT: take it away)
/reset           forget the conversation
/stats           what the conversation has cost so far
/exit            leave (Ctrl-D does so too)
Ctrl-C           stop the answer that is being written"""
COMMANDS = ("/help", "/system", "/reset", "/stats", "/exit")


def run(
    model: common.ModelArgument = None,
    plan: common.PlanOption = None,
    adapter: common.AdapterOption = None,
    weights: common.WeightsOption = None,
    cache: common.CacheOption = None,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    threads: common.ThreadsOption = None,
    kv_memory: common.KvMemoryOption = None,
    backend: common.BackendOption = None,
    system: Annotated[
        str | None, typer.Option(help="System message.", metavar="TEXT", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens in an answer.")] = 256,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(metavar="P", help="Keep tokens that together hold P.")] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Keep the K likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Keep tokens at least P times as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(metavar="X", help="1 is off.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Same seed, same answers.", show_default=False)
    ] = None,
) -> None:
    """Talk with a model that has a chat template. Answers stream to stdout.

    The conversation so far is sent with every turn; prefix caching keeps that cheap. Lines from a pipe
    are the user's turns, one each. /help lists the commands.

    \b
    Examples:
      trimtab chat
      trimtab chat ./my-model --cache kivi:bits=4 --system "Answer in one sentence."
      echo "What is 2 + 2?" | trimtab chat
    """
    chosen = common.make_plan(
        plan,
        model,
        adapter=adapter,
        weights=weights,
        cache=cache,
        dtype=dtype,
        device=device,
        threads=threads,
        kv_memory=kv_memory,
        backend=backend,
    )
    from trimtab import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    conversation = Conversation(common.make_engine(chosen), params, system)
    at_keyboard = not common.is_piped()
    if at_keyboard:
        common.note("/help lists the commands, Ctrl-D leaves")
    for line in _lines(at_keyboard):
        if line.startswith("/"):
            if not _obey(line, conversation):
                break
        elif line.strip():
            try:
                conversation.answer(line)
            except TrimtabError as error:
                if not at_keyboard:
                    raise
                common.note(f"error: {error}")


class Conversation:
    """The messages so far, and the engine that answers them."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None) -> None:
        self.engine = engine
        self.tokenizer = common.tokenizer_of(engine)
        self.params = params
        self.system = system
        self.turns: list[dict[str, str]] = []

    def answer(self, text: str) -> None:
        """Stream the answer to the user's `text`; what was written so far stays in the history."""
        self.turns.append({"role": "user", "content": text})
        said: list[str] = []
        with _stoppable() as stopped:
            try:
                # Closing a stream cancels its request, which gives its memory back.
                with closing(self.engine.stream(self._fitting_prompt(), self.params)) as pieces:
                    for piece in pieces:
                        said.append(piece.text)
                        sys.stdout.write(piece.text)
                        sys.stdout.flush()
                        if stopped():
                            break
            except TrimtabError:
                self.turns.pop()
                raise
            print(flush=True)
            if stopped():
                common.note("stopped")
        self.turns.append({"role": "assistant", "content": "".join(said)})

    def reset(self) -> None:
        """Forget the turns, not the system message."""
        self.turns.clear()

    def _fitting_prompt(self) -> list[int]:
        """Token ids of the conversation, without its oldest turns where it outgrew the context."""
        context = self.engine.model.config.context_length
        room = context - min(self.params.max_tokens or 1, context // 2)
        prompt, forgotten = self._encode(), 0
        while len(prompt) > room and len(self.turns) > 1 and not self.engine.cache.endless:
            del self.turns[:2]
            prompt, forgotten = self._encode(), forgotten + 1
        if forgotten:
            common.note(f"the context is full; questions forgotten, with their answers: {forgotten}")
        return prompt

    def _encode(self) -> list[int]:
        head = [{"role": "system", "content": self.system}] if self.system is not None else []
        text = self.tokenizer.apply_chat_template([*head, *self.turns])
        return self.tokenizer.encode(text, add_special_tokens=False)


def _lines(at_keyboard: bool) -> Iterator[str]:
    """The user's lines, until the end of input."""
    if not at_keyboard:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and cursor keys)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            common.note("\n/exit or Ctrl-D leaves")
        except EOFError:
            common.note("")
            return


def _obey(line: str, conversation: Conversation) -> bool:
    """Carry out a /command; False when the conversation is over."""
    command, _, rest = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/help":
        common.note(HELP)
    elif command == "/reset":
        conversation.reset()
        common.note("the conversation is forgotten")
    elif command == "/system":
        conversation.system = rest.strip() or None
        common.note("system message set" if conversation.system else "no system message")
    elif command == "/stats":
        common.note(_stats(conversation))
    else:
        common.note(f"no such command {command}.{did_you_mean(command, COMMANDS)}")
    return True


def _stats(conversation: Conversation) -> str:
    from trimtab.sizes import format_bytes

    stats = conversation.engine.stats()
    questions = sum(turn["role"] == "user" for turn in conversation.turns)
    return (
        f"{questions} questions in the history; {stats.tokens} tokens computed in {stats.steps} steps, "
        f"{stats.prefix_hit_tokens} taken from the prefix cache; KV cache "
        f"{format_bytes(stats.kv_bytes_held)} held, {format_bytes(stats.kv_bytes_peak)} at its peak"
    )


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only sets a mark, so that no engine step is cut in two; a second ends all."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
