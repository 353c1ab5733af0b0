"""Small generated exercises with one right answer each.

`SKILLS` names them all. An exercise is a question in plain words, the reference answer, and a check that
says whether another answer means the same. Nothing a model writes is ever executed.
"""

from trimtab.evaluation.skillset.base import Exercise, Skill
from trimtab.evaluation.skillset.recall import LOOKUP, PASSKEY
from trimtab.evaluation.skillset.writing import (
    ARITHMETIC,
    CAPITALS,
    FUNCTIONS,
    JSON_RECORD,
    REPEAT,
    WORD_PROBLEMS,
)

SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (PASSKEY, LOOKUP, JSON_RECORD, FUNCTIONS, CAPITALS, REPEAT, ARITHMETIC, WORD_PROBLEMS)
}

__all__ = ["SKILLS", "Exercise", "Skill"]
