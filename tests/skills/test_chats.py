import random
from collections import Counter

import pytest

from trimtab.errors import ConfigError
from trimtab.evaluation.corpus import shipped_text
from trimtab.skills import SKILLS, Passages, World
from trimtab.skills.chats import check_weights, conversation, drill

WORLD = World(Passages(shipped_text()), characters=(300, 600))


def roles(messages):
    return [message["role"] for message in messages]


def test_a_conversation_asks_and_answers_in_turn_with_the_follow_ups():
    exercise = SKILLS["lookup"].make(random.Random(0), WORLD)
    messages = conversation(exercise)
    assert roles(messages) == ["user", "assistant"] * 4
    assert messages[0]["content"] == exercise.question and messages[1]["content"] == exercise.reference
    assert messages[-1]["content"] == exercise.follow_ups[-1].reference


def test_drills_have_one_to_twelve_turns_and_long_exercises_stand_alone():
    turns = Counter()
    for seed in range(300):
        messages = drill(random.Random(seed), WORLD)
        assert roles(messages) == ["user", "assistant"] * (len(messages) // 2)
        first = messages[0]["content"]
        if "secret number" in first or first.startswith("{"):
            assert len(messages) <= 8  # with its follow-ups
        else:
            turns[len(messages) // 2] += 1
            assert not any("secret number" in m["content"] for m in messages)
    assert set(turns) == set(range(1, 13))


def test_weights_say_which_skills_are_drilled():
    rng = random.Random(0)
    weights = {"repeat": 3.0, "capitals": 1.0, "passkey": 0.0}
    asked = [m["content"] for _ in range(100) for m in drill(rng, WORLD, weights) if m["role"] == "user"]
    repeats = sum("Repeat" in q or "again" in q or "Copy" in q for q in asked)
    assert 0.65 < repeats / len(asked) < 0.85
    assert len(drill(rng, WORLD, {"json": 1.0}, most_turns=1)) == 2


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"jason": 1.0}, "Did you mean 'json'"),
        ({"json": -1.0}, "must be a number from 0 up"),
        ({"json": float("nan")}, "must be a number from 0 up"),
        ({"json": 0.0}, "weight above 0"),
        ({}, "weight above 0"),
    ],
)
def test_bad_weights_are_refused(weights, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_weights(weights)
