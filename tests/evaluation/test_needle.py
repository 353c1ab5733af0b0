import re

import pytest

from evaluation.fakes import ScriptedEngine, shipped_tokenizer
from trimtab.errors import ConfigError
from trimtab.evaluation.chat import question_ids
from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.tasks.base import TaskContext
from trimtab.evaluation.tasks.needle import Needle, NeedleOptions, make_cases
from trimtab.plan import MethodChoice
from trimtab.registry import TASKS


def find(prompt: str) -> str:
    """Read the prompt as a perfect model would."""
    name = re.search(r"What is the secret number of ([\w ]+)\?", prompt)[1]
    return re.search(rf"The secret number of {name} is (\d+)\.", prompt)[1]


def run(engine, **options):
    return Needle(NeedleOptions(**options)).run(engine, TaskContext())


def test_prompts_keep_to_their_length_and_the_needle_to_its_depth():
    options = NeedleOptions(lengths=(128, 400), depths=3, samples=2, distractors=2)
    cases = make_cases(shipped_tokenizer(), shipped_text(), options, seed=0)
    assert len(cases) == 12
    for case in cases:
        assert case.length * 0.6 < case.tokens <= case.length
        needle = re.search(rf"The secret number of [\w ]+ is {case.answer}\.", case.prose)
        place = needle.start() / (len(case.prose) - len(needle[0]))
        assert abs(place - case.depth) < 0.35
        assert case.prose.count("The secret number of") == 3
        assert find(case.prose + case.question) == case.answer
    by_depth = [c.prose.index(c.answer) for c in cases[:3]]
    assert by_depth == sorted(by_depth) and by_depth[0] < 100


def test_only_the_depth_differs_within_a_sample():
    options = NeedleOptions(lengths=(300,), depths=3, samples=2)
    cases = make_cases(shipped_tokenizer(), shipped_text(), options, seed=0)
    for sample in (cases[:3], cases[3:]):
        assert len({(c.answer, c.question) for c in sample}) == 1
        bare = {re.sub(r"The secret number of [\w ]+ is \d+\. ?", "", c.prose).split()[0] for c in sample}
        assert len(bare) == 1
    assert cases[0].answer != cases[3].answer
    again = make_cases(shipped_tokenizer(), shipped_text(), options, seed=0)
    assert again == cases
    assert make_cases(shipped_tokenizer(), shipped_text(), options, seed=1) != cases


def test_a_perfect_model_finds_all_and_a_blind_one_none():
    options = {"lengths": (128, 256), "depths": 2, "samples": 3}
    good = run(ScriptedEngine(lambda p: f"It is {find(p)}, I think."), **options)
    assert good.metrics["accuracy"].value == 1
    assert good.metrics["accuracy"].n == 12
    assert good.metrics["accuracy"].stderr > 0
    assert good.detail["accuracy"] == [[1.0, 1.0], [1.0, 1.0]]
    blind = run(ScriptedEngine(lambda p: "I do not know."), **options)
    assert blind.metrics["accuracy"].value == blind.metrics["accuracy_128"].value == 0


def test_one_wrong_digit_is_wrong():
    engine = ScriptedEngine(lambda p: find(p)[:-1] + str((int(find(p)[-1]) + 1) % 10))
    assert run(engine, lengths=(128,), depths=2, samples=2).metrics["accuracy"].value == 0


def test_the_grid_says_where_a_window_cache_forgets():
    def window(prompt: str) -> str:
        kept = prompt[-500:]
        return find(prompt) if find(prompt) in kept else "0"

    result = run(ScriptedEngine(window), lengths=(128, 512), depths=3, samples=2)
    assert result.detail["accuracy"] == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert result.metrics["accuracy_128"].value == 1
    assert result.metrics["accuracy_512"].value == pytest.approx(1 / 3)


def test_hidden_question_comes_after_the_context():
    tokenizer = shipped_tokenizer()
    engine = ScriptedEngine(judge=lambda _, tokens: ([-1.0] * len(tokens), [True] * len(tokens)))
    options = {"lengths": (128,), "depths": 2, "samples": 1}
    result = run(engine, question="hidden", **options)
    assert result.metrics["accuracy"].value == 1
    assert result.metrics["accuracy"].label == "needle, hidden"
    cases = make_cases(tokenizer, shipped_text(), NeedleOptions(**options), seed=0)
    for (context, continuation), case in zip(engine.calls[0], cases, strict=True):
        assert "What is" not in tokenizer.decode(context)
        assert tokenizer.decode(continuation).endswith(case.answer)
        whole = question_ids(tokenizer, case.prose + case.question)
        text = tokenizer.decode(context + continuation, skip_special_tokens=False)
        assert text == tokenizer.decode(whole, skip_special_tokens=False) + case.answer


def test_hidden_answer_is_right_only_if_every_digit_is_the_likeliest():
    def judge(_, tokens):
        return [-1.0] * len(tokens), [False] * (len(tokens) - 1) + [True]

    engine = ScriptedEngine(judge=judge)
    assert run(engine, question="hidden", lengths=(128,), samples=1).metrics["accuracy"].value == 0

    def sure_of_the_answer(_, tokens):
        return [-1.0] * len(tokens), [False] * (len(tokens) - 5) + [True] * 5

    engine = ScriptedEngine(judge=sure_of_the_answer)
    assert run(engine, question="hidden", lengths=(128,), samples=1).metrics["accuracy"].value == 1


def test_change_is_taken_answer_by_answer():
    task = Needle(NeedleOptions(lengths=(128,), depths=2, samples=2))
    good = task.run(ScriptedEngine(find), TaskContext())
    bad = task.run(ScriptedEngine(lambda p: "0"), TaskContext())
    change = task.relate(bad, good)["accuracy_change"]
    assert change.value == -1 and change.stderr == 0 and change.change_of == "accuracy"


def test_task_strings_hold_lists():
    choice = MethodChoice.parse("needle:lengths=256+512,question=hidden", TASKS)
    assert choice.options.lengths == (256, 512)
    assert str(choice) == "needle:lengths=256+512,question=hidden"
    assert MethodChoice.parse("needle:lengths=300", TASKS).options.lengths == (300,)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("needle:lengths=16", "at least 64"),
        ("needle:lengths=a+b", "must be a whole number"),
        ("needle:depths=0", "'depths' of task 'needle' is 0"),
        ("needle:question=maybe", "allowed: end, hidden"),
        ("needle:length=300", "Did you mean 'lengths'"),
    ],
)
def test_bad_options_are_refused(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        MethodChoice.parse(text, TASKS)


def test_prompts_longer_than_the_context_are_refused():
    with pytest.raises(ConfigError, match="make 'lengths' smaller"):
        run(ScriptedEngine(), lengths=(2040,))
