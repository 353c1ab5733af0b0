"""Which heads find and copy: the retrieval score of every query head, and what happens without the best.

Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, 2024, arXiv 2404.15574.

A needle (a sentence with a number) is put into prose at several depths and prompt lengths and asked for at
the end. The model answers greedily; in a step that puts out token w, a head that looks most at a place of
the number where w stands has copied that place. A trial's score is the share of the number's places that a
head copied; a head's score is the mean over the trials in which the answer was right. Only the number's own
places count, so words of the needle elsewhere in the prose give no hits.

As published, except that the needle is what must be put out (the number, not the sentence around it), a
place counts once, and a trial succeeds when the number is exactly right (published: half of the words).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.evaluation.chat import frame, has_chat_template
from trimtab.evaluation.inspection.watching import Answer, Head, answer
from trimtab.evaluation.tasks.needle import ANSWER_TOKENS, Case, NeedleOptions, first_number, make_cases
from trimtab.models.config import ModelConfig
from trimtab.models.tokenizer import Tokenizer
from trimtab.models.transformer import Model

RETRIEVAL = 0.1  # a score from which a head is called a retrieval head (reconstructed)

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class HeadScores:
    """`trials` float32 [n, L, H] of the right answers, and how many needles were asked for."""

    trials: Tensor
    asked: int

    @property
    def scores(self) -> Tensor:
        """Retrieval score 0..1 of each layer's each query head, float32 [L, H]."""
        return self.trials.mean(0)

    @property
    def found(self) -> int:
        return len(self.trials)

    def ranked(self) -> list[Head]:
        """All heads, the highest score first; ties in order of layer and head."""
        order = self.scores.flatten().argsort(descending=True, stable=True).tolist()
        return [divmod(i, self.trials.shape[2]) for i in order]

    def retrieval(self) -> list[Head]:
        """Heads with a score of at least `RETRIEVAL`, the highest first."""
        return [head for head in self.ranked() if self.scores[head] >= RETRIEVAL]


@dataclass(frozen=True, slots=True)
class Ablation:
    """Share of needles found with all heads, without `heads`, and without as many others, draw by draw."""

    heads: list[Head]
    whole: float
    without: float
    without_others: list[float]


def needle_cases(model: Model, prose: str, options: NeedleOptions, seed: int) -> list[Case]:
    """The prompts, `prose` being the hay; a ConfigError if the model's context is too short."""
    tokenizer = tokenizer_of(model)
    longest = max(options.lengths) + ANSWER_TOKENS
    if longest > model.config.context_length:
        raise ConfigError(
            f"the longest prompt is {max(options.lengths)} tokens and {ANSWER_TOKENS} are for the answer, "
            f"but the model's context is {model.config.context_length}; make 'lengths' smaller"
        )
    return make_cases(tokenizer, prose, options, seed)


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer; a ConfigError where it has none."""
    if model.tokenizer is None or not model.tokenizer.available:
        raise ConfigError(
            "retrieval heads are found with text, and this model has no tokenizer; name one that has"
        )
    return model.tokenizer


def score_heads(model: Model, cases: Sequence[Case], progress: Progress = lambda share: None) -> HeadScores:
    """Every head's retrieval score on `cases`. A ConfigError if the model answers none of them."""
    tokenizer = tokenizer_of(model)
    trials = []
    for number, case in enumerate(cases, 1):
        prompt, places = locate(tokenizer, case)
        said = answer(model, prompt, ANSWER_TOKENS, tokenizer.eos_ids)
        if _right(tokenizer, said, case):
            trials.append(copied(prompt, places, said))
        progress(number / len(cases))
    if not trials:
        raise ConfigError(
            f"the model answered none of {len(cases)} needle prompts, so no head can be scored; try shorter "
            "'lengths', or a model that follows questions"
        )
    return HeadScores(torch.stack(trials), len(cases))


def locate(tokenizer: Tokenizer, case: Case) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and the places in it of the number that the needle holds."""
    before, after = frame(tokenizer)
    text = before + case.prose + case.question + after
    start = len(before) + case.prose.index(case.needle) + case.needle.rindex(case.answer)
    encoded = tokenizer.backend.encode(text, add_special_tokens=not has_chat_template(tokenizer))
    end = start + len(case.answer)
    places = [i for i, (a, b) in enumerate(encoded.offsets) if a < end and b > start]
    return encoded.ids, places


def copied(prompt: Sequence[int], places: Sequence[int], said: Answer) -> Tensor:
    """Share of `places` that each head looked at most while just that token was put out, [L, H]."""
    hits = [torch.zeros_like(said.looked[0], dtype=torch.bool) for _ in places]
    for token, looked in zip(said.tokens, said.looked, strict=True):
        for hit, place in zip(hits, places, strict=True):
            if prompt[place] == token:
                hit |= looked == place
    return torch.stack(hits).float().mean(0)


def _right(tokenizer: Tokenizer, said: Answer, case: Case) -> bool:
    return first_number(tokenizer.decode(said.tokens)) == case.answer


def share_found(
    model: Model, cases: Sequence[Case], off: Sequence[Head], progress: Progress = lambda share: None
) -> float:
    """Share of needles found while the heads in `off` add nothing to the residual stream."""
    tokenizer = tokenizer_of(model)
    right = 0
    for number, case in enumerate(cases, 1):
        prompt, _ = locate(tokenizer, case)
        right += _right(tokenizer, answer(model, prompt, ANSWER_TOKENS, tokenizer.eos_ids, off), case)
        progress(number / len(cases))
    return right / len(cases)


def ablate(
    model: Model,
    cases: Sequence[Case],
    found: HeadScores,
    count: int,
    draws: int,
    seed: int,
    progress: Progress = lambda share: None,
) -> Ablation:
    """The causal check: needles found without the best `count` heads, and without as many of the others.

    `found` are the scores on the same `cases`. A ConfigError if there are not that many other heads.
    """
    check_ablation(model.config, count)
    ranked = found.ranked()
    rng = random.Random(f"ablate {seed}")
    sets = [ranked[:count], *(rng.sample(ranked[count:], count) for _ in range(draws))]
    shares = [
        share_found(model, cases, off, lambda share, i=i: progress((i + share) / len(sets)))
        for i, off in enumerate(sets)
    ]
    return Ablation(sets[0], found.found / found.asked, shares[0], shares[1:])


def check_ablation(config: ModelConfig, count: int) -> None:
    """A ConfigError unless a model of `config` has `count` heads to leave out and as many others."""
    total = config.num_layers * config.num_heads
    if not 1 <= count <= total // 2:
        raise ConfigError(
            f"{count} heads cannot be left out and compared with as many others: the model has {total}; "
            f"choose 1 to {total // 2}"
        )
