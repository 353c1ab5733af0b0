"""Exercises as conversations: what a chat model is trained on."""

from __future__ import annotations

import random
from collections.abc import Mapping

from trimtab.errors import ConfigError, did_you_mean
from trimtab.skills import SKILLS
from trimtab.skills.base import Exercise
from trimtab.skills.world import World

Message = dict[str, str]
MOST_TURNS = 12
EQUAL_WEIGHTS: Mapping[str, float] = dict.fromkeys(SKILLS, 1.0)


def conversation(exercise: Exercise) -> list[Message]:
    """The exercise and its follow-ups as alternating turns of `user` and `assistant`."""
    messages = []
    for each in (exercise, *exercise.follow_ups):
        messages.append({"role": "user", "content": each.question})
        messages.append({"role": "assistant", "content": each.reference})
    return messages


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises ConfigError for a skill that does not exist, a negative weight, or none above zero."""
    for name, weight in weights.items():
        if name not in SKILLS:
            raise ConfigError(f"there is no skill {name!r} to train on.{did_you_mean(name, SKILLS)}")
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"the weight of skill {name!r} is {weight}; it must be a number from 0 up")
    if not any(weights.values()):
        raise ConfigError("every skill has the weight 0; give at least one of them a weight above 0")


def drill(
    rng: random.Random,
    world: World,
    weights: Mapping[str, float] = EQUAL_WEIGHTS,
    *,
    most_turns: int = MOST_TURNS,
) -> list[Message]:
    """One conversation: a long exercise alone, or 1 to `most_turns` short ones after each other.

    `weights` are the chances of the first exercise's skill; those after it are drawn from the short skills
    by the same weights. Check them once with `check_weights`.
    """
    skill = SKILLS[_choose(rng, weights)]
    if skill.long:
        return conversation(skill.make(rng, world))
    short = {name: weight for name, weight in weights.items() if not SKILLS[name].long}
    skills = [skill, *(SKILLS[_choose(rng, short)] for _ in range(rng.randrange(most_turns)))]
    return [message for each in skills for message in conversation(each.make(rng, world))]


def _choose(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]
