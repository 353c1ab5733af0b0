import pytest

from evaluation.fakes import ScriptedEngine, shipped_tokenizer
from trimtab.errors import ConfigError
from trimtab.evaluation.chat import question_ids
from trimtab.evaluation.tasks import skills as task
from trimtab.evaluation.tasks.base import TaskContext
from trimtab.evaluation.tasks.skills import CORE, Skills, SkillsOptions, make_exercises
from trimtab.skills import SKILLS, held_out


def know_all(samples: int, seed: int = 0):
    made = make_exercises(shipped_tokenizer(), SkillsOptions(samples=samples), seed)
    return {exercise.question: exercise.reference for _, exercise in made}


def answering(known, wrong=()):
    def answer(prompt: str) -> str:
        question = prompt.split("<|user|>")[1].split("<|end|>")[0]
        return "no" if question.startswith(wrong) else known[question]

    return answer


def test_a_model_that_knows_all_scores_one_everywhere():
    engine = ScriptedEngine(answering(know_all(3)))
    result = Skills(SkillsOptions(samples=3)).run(engine, TaskContext())
    assert {name: m.value for name, m in result.metrics.items()} == dict.fromkeys(["accuracy", *SKILLS], 1.0)
    assert result.metrics["json"].n == 3
    assert result.metrics["accuracy"].n == 3 * len(CORE)


def test_headline_is_the_core_skills_only():
    wrong = ("Write as JSON", "What is 1", "What is 2", "What is 3", "What is 4", "Say in capitals")
    engine = ScriptedEngine(answering(know_all(4), wrong))
    result = Skills(SkillsOptions(samples=4)).run(engine, TaskContext())
    assert result.metrics["json"].value == 0
    assert result.metrics["capitals"].value == 0
    assert result.metrics["accuracy"].value == pytest.approx(1 - 1 / len(CORE))
    assert result.detail["averaged"] == list(CORE)


def test_without_core_skills_the_mean_is_over_what_was_asked():
    engine = ScriptedEngine(answering(know_all(2)))
    result = Skills(SkillsOptions(skills=("capitals",), samples=2)).run(engine, TaskContext())
    assert result.detail["averaged"] == ["capitals"]
    assert result.metrics["accuracy"].value == 1


def test_another_seed_asks_other_questions():
    engine = ScriptedEngine(answering(know_all(2, seed=7)))
    Skills(SkillsOptions(samples=2)).run(engine, TaskContext(seed=7))
    with pytest.raises(KeyError):
        Skills(SkillsOptions(samples=2)).run(engine, TaskContext(seed=8))


def test_exercises_are_held_out_and_passkeys_have_the_asked_length():
    options = SkillsOptions(skills=("passkey", "functions"), samples=4, passkey=600)
    for name, exercise in make_exercises(shipped_tokenizer(), options, 0):
        if name == "passkey":
            assert 400 < len(shipped_tokenizer().encode(exercise.question)) < 700
        else:
            function, what = exercise.question.removeprefix("Write a Python function ").split(" that ")
            assert held_out("function", function, what.removesuffix("."))


def test_passkeys_never_need_more_room_than_was_checked():
    """1,952 tokens are the most for a context of 2,048; half of the prompts would be too long as drawn."""
    options = SkillsOptions(skills=("passkey",), samples=6, passkey=1952)
    made = [exercise for _, exercise in make_exercises(shipped_tokenizer(), options, 0)]
    lengths = [len(question_ids(shipped_tokenizer(), exercise.question)) for exercise in made]
    assert max(lengths) + SKILLS["passkey"].max_tokens <= 2048 and min(lengths) > 1500


def test_a_passkey_beyond_the_context_is_a_clear_error():
    with pytest.raises(ConfigError, match="context is 2048 tokens; make it 1952 or less"):
        Skills(SkillsOptions(passkey=2_000)).run(ScriptedEngine(), TaskContext())


def test_where_answers_cannot_be_run_functions_are_refused(monkeypatch):
    monkeypatch.setattr(task, "can_run", lambda: False)
    with pytest.raises(ConfigError, match=r"leave it out with skills=json$"):
        Skills(SkillsOptions(skills=("json", "functions"))).run(ScriptedEngine(), TaskContext())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"skills": ("jason",)}, "Did you mean 'json'"),
        ({"skills": ("json", "json")}, "name each skill once"),
        ({"samples": 0}, "must be at least 1"),
        ({"passkey": 8}, "must be at least 32"),
    ],
)
def test_bad_options_are_refused(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        SkillsOptions(**options)
