"""What is asked: real prompts from a file, or passages of text of drawn lengths, as ready request bodies."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError
from trimtab.evaluation.load.lengths import LengthMix

FRAME_TOKENS = 48  # room for a chat template's frame
MARGIN = 1.3  # prompts are counted in characters: a prompt may have so many times the tokens we think


def read_prompts(path: Path) -> list[str]:
    """Prompts from a JSONL file: each line has `prompt`, or `turns` (as Spec-Bench has; the first).

    Raises ConfigError naming the line for anything else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--prompts {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts {str(path)!r} is not UTF-8; convert it first") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt = record["prompt"] if "prompt" in record else record["turns"][0]
        except (ValueError, KeyError, IndexError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(
                f"line {number} of {str(path)!r} holds no prompt; each line must be a JSON object with "
                "'prompt' (a text) or 'turns' (a list of texts)"
            )
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"--prompts {str(path)!r} is empty; give it at least one line")
    return prompts


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its text, the tokens we think it has, and the most tokens wanted back."""

    text: str
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """An endless, seeded series of requests.

    `prompts` None: passages of `text` of the mix's lengths, each from another place, so that prefix caching
    finds nothing. Otherwise `prompts` in a shuffled order, again and again. `characters_per_token` is what
    the server's tokenizer was seen to make of them; `context` bounds prompt and answer together.
    """

    mix: LengthMix
    context: int
    characters_per_token: float
    text: str
    prompts: tuple[str, ...] | None = None

    def fitting(self) -> list[tuple[str, int]]:
        """Those of `prompts` that leave room for an answer, with the tokens we think they have."""
        counted = [(p, round(len(p) / self.characters_per_token) + 1) for p in self.prompts or ()]
        return [(p, tokens) for p, tokens in counted if self._room(tokens) >= 16]

    def _room(self, prompt_tokens: int) -> int:
        return self.context - round(MARGIN * prompt_tokens) - FRAME_TOKENS

    def draw(self, seed: int) -> Iterator[Ask]:
        """The series of a seed. Raises ConfigError if no prompt fits."""
        rng = random.Random(seed)
        if self.prompts is None:
            while True:
                yield self._passage(*self.mix.draw(rng, self.context), rng)
        fitting = self.fitting()
        if not fitting:
            raise ConfigError(
                f"none of the {len(self.prompts)} prompts fits into the context of {self.context} tokens; "
                "give shorter ones"
            )
        while True:
            rng.shuffle(fitting)
            for text, tokens in fitting:
                _, wanted = self.mix.draw(rng, self.context)
                yield Ask(text, tokens, min(wanted, self._room(tokens)))

    def _passage(self, prompt: int, output: int, rng: random.Random) -> Ask:
        prompt = min(prompt, max(1, int((self.context - FRAME_TOKENS) / MARGIN) - 1))
        size = max(1, round(prompt * self.characters_per_token))
        text = self.text * (size // len(self.text) + 2)
        start = text.find(" ", rng.randrange(len(self.text))) + 1  # from a word on
        return Ask(text[start : start + size].strip() or "A", prompt, max(1, min(output, self._room(prompt))))


@dataclass(frozen=True, slots=True)
class Form:
    """How a request is written down for a server."""

    model: str
    chat: bool
    stream: bool = True
    temperature: float = 0.0
    ignore_eos: bool = True  # so that an answer has just the drawn length
    plain: bool = False  # OpenAI's own fields only

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, ask: Ask) -> bytes:
        fields: dict[str, Any] = {"model": self.model}
        if self.chat:
            fields["messages"] = [{"role": "user", "content": ask.text}]
        else:
            fields["prompt"] = ask.text
        fields |= {"max_tokens": ask.max_tokens, "temperature": self.temperature}
        if self.stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        if not self.plain:
            # vLLM's names. The ids tell how many tokens a chunk brought.
            fields |= {"ignore_eos": True} if self.ignore_eos else {}
            fields |= {"return_token_ids": True} if self.stream else {}
        return json.dumps(fields, ensure_ascii=False).encode()
