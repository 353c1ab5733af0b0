"""Needle in a haystack: is one sentence still found after the cache has been squeezed?

A sentence such as "The secret number of Ann Lee is 48213." is put into real prose at a sentence boundary,
at several depths and prompt lengths, and asked for at the end. With `question=end` the question is part of
the prompt, so a policy that looks at the end of the prompt before it evicts knows what will be asked
(query-aware). With `question=hidden` the prompt ends with the prose, and question and answer arrive as
decoded tokens afterwards (query-agnostic): the honest figure for a cached document with many questions.

Not covered: several needles that must be combined, and needles in other words than the question's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimtab.errors import ConfigError
from trimtab.evaluation.accuracy import accuracy, accuracy_change
from trimtab.evaluation.chat import question_ids, split_question_ids, tokenizer_of
from trimtab.evaluation.corpus import characters_per_token, load_text
from trimtab.evaluation.statistics import mean
from trimtab.evaluation.tasks.base import Metric, Task, TaskContext, TaskResult
from trimtab.registry import TASKS, Card
from trimtab.skills import vocabulary as words
from trimtab.skills.haystack import Haystack

if TYPE_CHECKING:
    from trimtab.engine.engine import Engine
    from trimtab.models.tokenizer import Tokenizer

ANSWER_TOKENS = 24  # room for a model that answers in a whole sentence
FITTING_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class NeedleOptions:
    """Settings of `needle`.

    lengths: prompt lengths in tokens, e.g. `256+512+1024`.
    depths: how many depths, spread evenly from the start (0) to the end (1) of the prose.
    samples: prompts per cell of the grid.
    distractors: further secret sentences, about other people, at drawn places.
    question: `end` (part of the prompt) or `hidden` (arrives after the prompt was compressed).
    text, folder: the prose, as for `perplexity`.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: int = 5
    samples: int = 4
    distractors: int = 0
    question: Literal["end", "hidden"] = "end"
    text: str = "shipped"
    folder: str = "data"

    def __post_init__(self) -> None:
        for name, least in (("depths", 1), ("samples", 1), ("distractors", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"option {name!r} of task 'needle' is {getattr(self, name)}; it must be at least {least}"
                )
        if not self.lengths or min(self.lengths) < 64:
            raise ConfigError(
                f"option 'lengths' of task 'needle' is {'+'.join(map(str, self.lengths))!r}; each must be at "
                "least 64 tokens"
            )


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt: prose with the needle in it, the question about it, and the digits to be found."""

    length: int
    depth: float
    prose: str
    needle: str  # the sentence, which the prose has once
    question: str
    answer: str
    tokens: int


@TASKS.add(
    options=NeedleOptions,
    card=Card(
        title="Needle in a haystack",
        idea="A sentence with a secret number is hidden in prose at several depths and prompt lengths, and "
        "the number is asked for at the end. Right means that the greedy answer has exactly its digits.",
        exactness="Exact match, no judge. All plans get the same prompts; at one length and sample only the "
        "depth of the needle differs.",
        cost="lengths x depths x samples prompts; about 36,000 tokens with the defaults.",
        needs="A model that can do it with the full cache: read the other plans against that one.",
        avoid_when="You want to know about quality in general: finding one sentence is one skill of many.",
        paper="Mohtashami and Jaggi, Landmark Attention (passkey retrieval), 2023",
        arxiv="2305.16300",
    ),
)
class Needle(Task):
    options: NeedleOptions

    def run(self, engine: Engine, ctx: TaskContext) -> TaskResult:
        o, model = self.options, engine.model
        longest = max(o.lengths) + ANSWER_TOKENS
        if longest > model.config.context_length:
            raise ConfigError(
                f"task 'needle' wants prompts of {max(o.lengths)} tokens and {ANSWER_TOKENS} for the answer, "
                f"but the model's context is {model.config.context_length}; make 'lengths' smaller"
            )
        cases = make_cases(tokenizer_of(engine, "needle"), load_text(o.text, o.folder), o, ctx.seed)
        found: list[bool] = []
        batch = engine.plan.max_batch
        answer = self._generate if o.question == "end" else self._score
        for start in range(0, len(cases), batch):
            found += answer(engine, cases[start : start + batch])
            ctx.progress(min(1.0, (start + batch) / len(cases)))
        return summary(cases, found, o)

    def relate(self, result: TaskResult, reference: TaskResult) -> dict[str, Metric]:
        return accuracy_change(result, reference)

    def _generate(self, engine: Engine, cases: Sequence[Case]) -> list[bool]:
        from trimtab.decoding.sampling_params import SamplingParams

        tokenizer = tokenizer_of(engine, "needle")
        prompts = [question_ids(tokenizer, c.prose + c.question) for c in cases]
        outs = engine.generate(prompts, SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0))
        return [first_number(out.text) == case.answer for out, case in zip(outs, cases, strict=True)]

    def _score(self, engine: Engine, cases: Sequence[Case]) -> list[bool]:
        """The greedy answer is the right one exactly if each of its tokens is the argmax after the others."""
        tokenizer = tokenizer_of(engine, "needle")
        pairs, answer_lengths = [], []
        for case in cases:
            prose, question = split_question_ids(tokenizer, case.prose, case.question)
            answer = tokenizer.encode(case.answer, add_special_tokens=False)
            pairs.append((prose, question + answer))
            answer_lengths.append(len(answer))
        scored = engine.score(pairs)
        return [all(s.greedy[-n:]) for s, n in zip(scored, answer_lengths, strict=True)]


def first_number(text: str) -> str | None:
    found = re.search(r"\d+", text)
    return found[0] if found else None


def depths_of(count: int) -> list[float]:
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.5]


def make_cases(tokenizer: Tokenizer, text: str, options: NeedleOptions, seed: int) -> list[Case]:
    """All prompts of the grid, ordered by length, sample and depth."""
    cases = []
    for length in options.lengths:
        for sample in range(options.samples):
            # A string seeds `Random` the same way in every process.
            key = f"needle {seed} {length} {sample}"
            cases += [_case(tokenizer, text, length, d, options, key) for d in depths_of(options.depths)]
    return cases


def _case(
    tokenizer: Tokenizer, text: str, length: int, depth: float, options: NeedleOptions, key: str
) -> Case:
    """The longest prose whose prompt stays within `length` tokens, with the needle in it."""
    room = length
    case = None
    for _ in range(FITTING_ROUNDS):
        rng = random.Random(key)
        names = words.full_names(rng, 1 + options.distractors)
        secrets = [words.secret_number(rng) for _ in names]
        places = [rng.random() for _ in names[1:]]
        hay = Haystack.draw(text, rng, characters=round(room * characters_per_token(tokenizer, text)))
        for name, secret, place in zip(names[1:], secrets[1:], places, strict=True):
            hay = hay.insert(words.secret_sentence(name, secret), depth=place)
        needle = words.secret_sentence(names[0], secrets[0])
        hay = hay.insert(needle, depth=depth)
        question = f"\n\n{words.secret_question(names[0])}"
        tokens = len(question_ids(tokenizer, hay.text + question))
        case = Case(length, depth, hay.text, needle, question, secrets[0], tokens)
        if tokens <= length:
            return case
        room -= max(8, tokens - length)
    assert case is not None
    raise ConfigError(
        f"task 'needle' cannot make a prompt of {length} tokens from text {options.text!r} (the shortest has "
        f"{case.tokens}); use longer 'lengths'"
    )


def summary(cases: Sequence[Case], found: Sequence[bool], options: NeedleOptions) -> TaskResult:
    """Accuracy over all, by length, and by cell of the grid."""
    hidden = options.question == "hidden"
    pairs = list(zip(cases, found, strict=True))

    label = "needle, hidden" if hidden else "needle"
    metrics = {"accuracy": accuracy(found, label=label, title=f"{label}: share found", axis="quality")}
    for length in options.lengths:
        metrics[f"accuracy_{length}"] = accuracy([ok for c, ok in pairs if c.length == length])
    grid = [
        [
            mean([float(ok) for c, ok in pairs if c.length == length and c.depth == depth])
            for length in options.lengths
        ]
        for depth in depths_of(options.depths)
    ]
    detail = {
        "lengths": list(options.lengths),
        "depths": depths_of(options.depths),
        "accuracy": grid,
        "right": [int(ok) for ok in found],
        "samples": options.samples,
        "question": options.question,
        "prompt_tokens": [mean([c.tokens for c in cases if c.length == n]) for n in options.lengths],
    }
    return TaskResult(metrics, detail)
