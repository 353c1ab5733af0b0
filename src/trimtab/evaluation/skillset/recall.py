"""Skills that look something up in the prompt: what a lossy cache loses first."""

from __future__ import annotations

import json
import random

from trimtab.evaluation.corpus import Haystack, shipped_text
from trimtab.evaluation.skillset import vocabulary as words
from trimtab.evaluation.skillset.base import Exercise, Skill

PASSKEY_CHARACTERS = 1_000  # about 300 tokens of the shipped model
PASSKEY_SECRETS = 2
RECORDS = (2, 5)
FIELDS = ("age", "city", "job")


def _passkey(rng: random.Random) -> Exercise:
    names = words.full_names(rng, PASSKEY_SECRETS)
    secrets = {name: words.secret_number(rng) for name in names}
    haystack = Haystack.draw(shipped_text(), rng, characters=PASSKEY_CHARACTERS)
    for name, number in secrets.items():
        haystack = haystack.insert(words.secret_sentence(name, number), depth=rng.random())
    asked = rng.choice(names)
    return Exercise(f"{haystack.text}\n\n{words.secret_question(asked)}", secrets[asked])


def record(rng: random.Random, name: str) -> dict[str, str | int]:
    return {
        "name": name,
        "age": rng.randrange(20, 90),
        "city": rng.choice(words.CITIES),
        "job": rng.choice(words.JOBS),
    }


def _lookup(rng: random.Random) -> Exercise:
    names = words.full_names(rng, rng.randint(*RECORDS))
    records = [record(rng, name) for name in names]
    asked = rng.choice(records)
    field = rng.choice(FIELDS)
    lines = "\n".join(json.dumps(r) for r in records)
    return Exercise(f"{lines}\nWhat is the {field} of {asked['name']}?", str(asked[field]))


PASSKEY = Skill("passkey", "passkey in 300 tokens of prose", _passkey, max_tokens=12, core=True)
LOOKUP = Skill("lookup", "key lookup in JSON records", _lookup, max_tokens=12, core=True)
