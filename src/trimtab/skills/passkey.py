"""Secret numbers hidden in prose: what a lossy cache loses first (Mohtashami and Jaggi, arXiv 2305.16300)."""

from __future__ import annotations

import itertools
import random

from trimtab.skills import vocabulary as words
from trimtab.skills.base import Exercise, Skill
from trimtab.skills.haystack import Haystack
from trimtab.skills.world import World

SENTENCES = (
    words.secret_sentence("{name}", "{number}"),
    "Remember that the secret number of {name} is {number}.",
    "{name} has the secret number {number}.",
)
QUESTIONS = (
    words.secret_question("{name}"),
    "Which secret number does {name} have?",
    "Tell me the secret number of {name}.",
)
MAIN, *OTHERS = itertools.product(SENTENCES, QUESTIONS)


def _passkey(rng: random.Random, world: World) -> Exercise:
    secrets = {
        name: world.draw(
            lambda: words.secret_number(rng), lambda number, name=name: world.has("secret", name, number)
        )
        for name in world.people(rng, rng.randint(*world.secrets))
    }
    haystack = Haystack(world.texts.excerpt(rng, rng.randint(*world.characters)))
    asked = []
    for name, number in secrets.items():
        sentence, question = world.worded(rng, (MAIN,), OTHERS)
        haystack = haystack.insert(sentence.format(name=name, number=number), depth=rng.random())
        asked.append(Exercise(question.format(name=name), number))
    first, *more = rng.sample(asked, len(asked))
    return Exercise(f"{haystack.text}\n\n{first.question}", first.reference, follow_ups=tuple(more))


PASSKEY = Skill("passkey", "secret number in prose", _passkey, max_tokens=12, core=True, long=True)
