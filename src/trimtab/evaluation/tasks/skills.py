"""Skills: small exercises with one right answer each, answered greedily.

The exercises are of the kinds the shipped model was trained on, in their main wording, with parameters that
training never uses. Any other model can be asked them too: through its chat template where it has one. See
`trimtab.skills`.

Not covered: knowledge, reasoning, long answers. This is a smoke detector, not a benchmark of models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError, did_you_mean
from trimtab.evaluation.accuracy import accuracy, accuracy_change
from trimtab.evaluation.chat import question_ids, tokenizer_of
from trimtab.evaluation.corpus import characters_per_token, shipped_text
from trimtab.evaluation.tasks.base import Metric, Task, TaskContext, TaskResult
from trimtab.registry import TASKS, Card
from trimtab.skills import SKILLS, Exercise, Passages, World
from trimtab.skills.execute import can_run

if TYPE_CHECKING:
    from trimtab.engine.engine import Engine
    from trimtab.models.tokenizer import Tokenizer

CORE = tuple(s.name for s in SKILLS.values() if s.core)
LEAST_PASSKEY = 32  # tokens: two or three sentences
SECRETS = 2
FRAME = 96  # tokens: room for the secret sentences, the question and the answer of a passkey


@dataclass(frozen=True, slots=True)
class SkillsOptions:
    """Settings of `skills`.

    skills: which ones, e.g. `json+lookup`.
    samples: exercises per skill.
    passkey: tokens of prose around the secret numbers of `passkey`.
    """

    skills: tuple[str, ...] = tuple(SKILLS)
    samples: int = 24
    passkey: int = 300

    def __post_init__(self) -> None:
        for name in self.skills:
            if name not in SKILLS:
                raise ConfigError(f"task 'skills' has no skill {name!r}.{did_you_mean(name, SKILLS)}")
        if not self.skills or len(set(self.skills)) < len(self.skills):
            raise ConfigError(
                f"option 'skills' of task 'skills' is {'+'.join(self.skills)!r}; name each skill once"
            )
        for name, least in (("samples", 1), ("passkey", LEAST_PASSKEY)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"option {name!r} of task 'skills' is {getattr(self, name)}; it must be at least {least}"
                )


@TASKS.add(
    options=SkillsOptions,
    card=Card(
        title="Skills",
        idea="Greedy answers to generated exercises whose parameters are held out from training: "
        + "; ".join(f"{s.name} ({s.title})" for s in SKILLS.values())
        + f". The headline is the share over {', '.join(CORE)}: what the shipped model has learnt.",
        exactness="Exact match; JSON is compared as values, rules are checked, and functions are run on test "
        "inputs, each answer in a process of its own with limits (no sandbox against hostile code).",
        cost="skills x samples short prompts, and a process of about 0.03 s for each function.",
        needs="A model that follows instructions; one without a chat template gets the bare question.",
        avoid_when="You compare different models with each other: the exercises fit the shipped one.",
    ),
)
class Skills(Task):
    options: SkillsOptions

    def run(self, engine: Engine, ctx: TaskContext) -> TaskResult:
        from trimtab.decoding.sampling_params import SamplingParams

        o, tokenizer = self.options, tokenizer_of(engine, "skills")
        self._check(engine)
        exercises = make_exercises(tokenizer, o, ctx.seed)
        right: dict[str, list[bool]] = {name: [] for name in o.skills}
        batch = engine.plan.max_batch
        for start in range(0, len(exercises), batch):
            part = exercises[start : start + batch]
            prompts = [question_ids(tokenizer, exercise.question) for _, exercise in part]
            params = [SamplingParams(max_tokens=SKILLS[n].max_tokens, temperature=0.0) for n, _ in part]
            for out, (name, exercise) in zip(engine.generate(prompts, params), part, strict=True):
                right[name].append(exercise.is_right(out.text))
            ctx.progress(min(1.0, (start + batch) / len(exercises)))
        return summary(right)

    def relate(self, result: TaskResult, reference: TaskResult) -> dict[str, Metric]:
        return accuracy_change(result, reference)

    def _check(self, engine: Engine) -> None:
        o, context = self.options, engine.model.config.context_length
        if "passkey" in o.skills and o.passkey + FRAME > context:
            raise ConfigError(
                f"option 'passkey' of task 'skills' is {o.passkey}, but the model's context is {context} "
                f"tokens; make it {context - FRAME} or less"
            )
        if "functions" in o.skills and not can_run():
            raise ConfigError(
                "skill 'functions' runs what the model writes in a process with limits, which this machine "
                "cannot do; leave it out with skills="
                + "+".join(name for name in o.skills if name != "functions")
            )


def make_exercises(tokenizer: Tokenizer, options: SkillsOptions, seed: int) -> list[tuple[str, Exercise]]:
    """`samples` exercises of each skill with its name, all of them held out, in the main wording."""
    characters = round(options.passkey * characters_per_token(tokenizer, shipped_text()))
    world = World(
        Passages(shipped_text()),
        split="held-out",
        characters=(characters, characters),
        secrets=(SECRETS, SECRETS),
        paraphrases=0.0,
        strangers=0.0,
    )
    made = []
    for name in options.skills:
        # A string seeds `Random` the same way in every process.
        rng = random.Random(f"skills {seed} {name}")
        for _ in range(options.samples):
            exercise = SKILLS[name].make(rng, world)
            if name == "passkey":
                exercise = _fitting(exercise, rng, world, tokenizer, options.passkey)
            made.append((name, exercise))
    return made


def _fitting(
    exercise: Exercise, rng: random.Random, world: World, tokenizer: Tokenizer, passkey: int
) -> Exercise:
    """The passkey, or another with less prose where this one has more tokens than there is room for.

    Characters per token differ from passage to passage, and `passkey` may be as long as the context allows.
    """
    skill = SKILLS["passkey"]
    room = passkey + FRAME - skill.max_tokens
    while (tokens := len(question_ids(tokenizer, exercise.question))) > room:
        characters = int(world.characters[0] * room / tokens) - 1
        world = replace(world, characters=(characters, characters))
        exercise = skill.make(rng, world)
    return exercise


def summary(right: dict[str, list[bool]]) -> TaskResult:
    """Accuracy of each skill, and over the core ones together (over all, when no core skill was asked)."""
    averaged = [name for name in right if SKILLS[name].core] or list(right)
    together = [answer for name in averaged for answer in right[name]]
    metrics = {"accuracy": accuracy(together, label="skills", title="skills: share right", axis="quality")}
    metrics |= {name: accuracy(answers) for name, answers in right.items()}
    return TaskResult(metrics, {"averaged": averaged, "right": [int(answer) for answer in together]})
