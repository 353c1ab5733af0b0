"""Records of people: write one as JSON, and look up a field among several."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from trimtab.skills import vocabulary as words
from trimtab.skills.base import Exercise, Skill, unfenced
from trimtab.skills.world import World

Record = dict[str, str | int]
Choice = Callable[[tuple[str, ...], tuple[str, ...]], str]

FIELDS = ("age", "city", "job")
FOLLOW_UPS = 3
SENTENCES = (
    "In {city} lives {name}, a {job} aged {age}.",
    "{name} is a {age} year old {job} from {city}.",
    "{name}, {age}, works as a {job} in {city}.",
)
OTHER_SENTENCES = (
    "{name} of {city} is {age} and works as a {job}.",
    "The {job} {name} is {age} years old and lives in {city}.",
    "Age {age}, city {city}, job {job}, name {name}.",
)
OTHER_QUESTIONS = {
    "age": ("How old is {name}?",),
    "city": ("Where does {name} live?", "In which city does {name} live?"),
    "job": ("What does {name} do?", "What does {name} work as?"),
}


def record(rng: random.Random, name: str, choice: Choice | None = None) -> Record:
    """A record of `name`; `choice(main, more)` chooses from the lists (from the main ones if not given)."""
    choice = choice or (lambda main, more: rng.choice(main))
    return {
        "name": name,
        "age": rng.randrange(20, 90),
        "city": choice(words.CITIES, words.MORE_CITIES),
        "job": choice(words.JOBS, words.MORE_JOBS),
    }


def record_of_split(rng: random.Random, world: World, name: str) -> Record:
    return world.draw(
        lambda: record(rng, name, lambda main, more: world.choice(rng, main, more)),
        lambda made: world.has("record", *made.values()),
    )


def _lookup(rng: random.Random, world: World) -> Exercise:
    names = world.people(rng, rng.randint(*world.records))
    records = [record_of_split(rng, world, name) for name in names]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    cells = [(r, field) for r in records for field in FIELDS]
    asked = rng.sample(cells, min(1 + FOLLOW_UPS, len(cells)))
    first, *more = (_field(rng, world, *each) for each in asked)
    return Exercise(f"{lines}\n{first.question}", first.reference, follow_ups=tuple(more))


def _field(rng: random.Random, world: World, asked: Record, field: str) -> Exercise:
    question = world.worded(rng, (f"What is the {field} of {{name}}?",), OTHER_QUESTIONS[field])
    return Exercise(question.format(**asked), str(asked[field]))


def _json_record(rng: random.Random, world: World) -> Exercise:
    r = record_of_split(rng, world, world.people(rng, 1)[0])
    sentence = world.worded(rng, SENTENCES, OTHER_SENTENCES).format(**r)
    return Exercise(f"Write as JSON: {sentence}", json.dumps(r, ensure_ascii=False), check=same_json)


def same_json(answer: str, reference: str) -> bool:
    """Equal as JSON values; key order and white space do not count."""
    try:
        return json.loads(unfenced(answer)) == json.loads(reference)
    except (ValueError, RecursionError):
        return False


LOOKUP = Skill("lookup", "key lookup in JSON records", _lookup, max_tokens=16, core=True, long=True)
JSON_RECORD = Skill("json", "write a record as JSON", _json_record, max_tokens=72, core=True)
