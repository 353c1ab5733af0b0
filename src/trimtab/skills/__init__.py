"""Small generated exercises with one right answer each, for training and for evaluation.

`SKILLS` names them all. An exercise is a question in plain words, the reference answer, and a check that
says whether another answer means the same. Exercises are drawn from a `World`: prose, word lists, and the
split their parameters belong to. See `docs/skills.md`.
"""

from trimtab.skills.base import Exercise, Skill
from trimtab.skills.constraints import CONSTRAINTS
from trimtab.skills.copying import CAPITALS, REPEAT
from trimtab.skills.editing import EDITING
from trimtab.skills.functions import FUNCTIONS
from trimtab.skills.passkey import PASSKEY
from trimtab.skills.records import JSON_RECORD, LOOKUP
from trimtab.skills.split import held_out
from trimtab.skills.sums import ARITHMETIC, WORD_PROBLEMS
from trimtab.skills.texts import Passages, Texts
from trimtab.skills.world import World

SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        PASSKEY,
        LOOKUP,
        JSON_RECORD,
        FUNCTIONS,
        CAPITALS,
        REPEAT,
        ARITHMETIC,
        WORD_PROBLEMS,
        EDITING,
        CONSTRAINTS,
    )
}

__all__ = ["SKILLS", "Exercise", "Passages", "Skill", "Texts", "World", "held_out"]
