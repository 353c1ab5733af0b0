"""Skills: small exercises with one right answer each, answered greedily.

The exercises are those the shipped model was trained on (with drawn parameters), and any other model can
be asked them too: through its chat template where it has one. See `trimtab.evaluation.skillset`.

Not covered: knowledge, reasoning, long answers. This is a smoke detector, not a benchmark of models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError, did_you_mean
from trimtab.evaluation.accuracy import accuracy, accuracy_change
from trimtab.evaluation.chat import question_ids, tokenizer_of
from trimtab.evaluation.skillset import SKILLS
from trimtab.evaluation.tasks.base import Metric, Task, TaskContext, TaskResult
from trimtab.registry import TASKS, Card

if TYPE_CHECKING:
    from trimtab.engine.engine import Engine

CORE = tuple(s.name for s in SKILLS.values() if s.core)


@dataclass(frozen=True, slots=True)
class SkillsOptions:
    """Settings of `skills`.

    skills: which ones, e.g. `json+lookup`.
    samples: exercises per skill.
    """

    skills: tuple[str, ...] = tuple(SKILLS)
    samples: int = 24

    def __post_init__(self) -> None:
        for name in self.skills:
            if name not in SKILLS:
                raise ConfigError(f"task 'skills' has no skill {name!r}.{did_you_mean(name, SKILLS)}")
        if not self.skills or len(set(self.skills)) < len(self.skills):
            raise ConfigError(
                f"option 'skills' of task 'skills' is {'+'.join(self.skills)!r}; name each skill once"
            )
        if self.samples < 1:
            raise ConfigError(f"option 'samples' of task 'skills' is {self.samples}; it must be at least 1")


@TASKS.add(
    options=SkillsOptions,
    card=Card(
        title="Skills",
        idea="Greedy answers to generated exercises, counted right on exact match: "
        + "; ".join(f"{s.name} ({s.title})" for s in SKILLS.values())
        + f". The headline is the share over {', '.join(CORE)}: what the shipped model has learnt.",
        exactness="Exact match; JSON is compared as values, functions by their syntax trees with local names "
        "made equal. Nothing a model writes is executed.",
        cost="skills x samples short prompts.",
        needs="A model that follows instructions; one without a chat template gets the bare question.",
        avoid_when="You compare different models with each other: the exercises fit the shipped one.",
    ),
)
class Skills(Task):
    options: SkillsOptions

    def run(self, engine: Engine, ctx: TaskContext) -> TaskResult:
        from trimtab.decoding.sampling_params import SamplingParams

        o, tokenizer = self.options, tokenizer_of(engine, "skills")
        exercises = []
        for name in o.skills:
            rng = random.Random(f"skills {ctx.seed} {name}")
            exercises += [(SKILLS[name], SKILLS[name].make(rng)) for _ in range(o.samples)]
        right: dict[str, list[bool]] = {name: [] for name in o.skills}
        batch = engine.plan.max_batch
        for start in range(0, len(exercises), batch):
            part = exercises[start : start + batch]
            prompts = [question_ids(tokenizer, exercise.question) for _, exercise in part]
            params = [SamplingParams(max_tokens=skill.max_tokens, temperature=0.0) for skill, _ in part]
            for out, (skill, exercise) in zip(engine.generate(prompts, params), part, strict=True):
                right[skill.name].append(exercise.is_right(out.text))
            ctx.progress(min(1.0, (start + batch) / len(exercises)))
        return summary(right)

    def relate(self, result: TaskResult, reference: TaskResult) -> dict[str, Metric]:
        return accuracy_change(result, reference)


def summary(right: dict[str, list[bool]]) -> TaskResult:
    """Accuracy of each skill, and over the core ones together (over all, when no core skill was asked)."""
    averaged = [name for name in right if SKILLS[name].core] or list(right)
    together = [answer for name in averaged for answer in right[name]]
    metrics = {"accuracy": accuracy(together, label="skills", title="skills: share right", axis="quality")}
    metrics |= {name: accuracy(answers) for name, answers in right.items()}
    return TaskResult(metrics, {"averaged": averaged, "right": [int(answer) for answer in together]})
