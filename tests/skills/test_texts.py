import random

import pytest

from trimtab.errors import ConfigError
from trimtab.evaluation.corpus import shipped_text
from trimtab.skills import Passages, World
from trimtab.skills.texts import sentence

POEM = "the rose is red\nthe violet blue\n" * 200


def test_excerpts_are_whole_sentences_of_the_text_within_the_asked_size():
    text, texts = shipped_text(), Passages(shipped_text())
    ends = []
    for seed in range(30):
        cut = texts.excerpt(random.Random(seed), 800)
        assert cut in text and 400 < len(cut) <= 800
        ends.append(cut[-1])
    assert sum(end in ".!?\"')" for end in ends) >= 27  # the others end within a long sentence


def test_prose_without_sentences_is_cut_between_words():
    for seed in range(20):
        cut = Passages(POEM).excerpt(random.Random(seed), 100)
        assert 80 < len(cut) <= 100
        assert set(cut.split()) <= {"the", "rose", "is", "red", "violet", "blue"}


def test_texts_are_chosen_by_their_length_and_a_short_one_is_given_whole():
    texts = Passages(["", "One. Two.", "x " * 5_000])
    drawn = [texts.excerpt(random.Random(seed), 50) for seed in range(300)]
    assert sum(cut[0] == "x" for cut in drawn) > 290
    assert Passages("One. Two.").excerpt(random.Random(0), 50) == "One. Two."


def test_an_excerpt_at_the_end_of_a_text_is_not_stunted():
    text = "Here is a sentence of some words. " * 300
    assert all(len(Passages(text).excerpt(random.Random(seed), 5_000)) > 4_900 for seed in range(20))


def test_sentences_are_one_line_of_moderate_length():
    for source in (shipped_text(), POEM, "No end", "word" * 500):
        for seed in range(30):
            found = sentence(Passages(source), random.Random(seed))
            assert 1 <= len(found) <= 110 and "\n" not in found


@pytest.mark.parametrize("texts", ["", " \n", [], ["", " "]])
def test_no_text_is_a_clear_error(texts):
    with pytest.raises(ConfigError, match="at least one text"):
        Passages(texts)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"split": "test"}, "no split 'test'"),
        ({"characters": (500, 400)}, "'characters' of the skills is"),
        ({"secrets": (0, 2)}, "from 1 to 20"),
        ({"records": (2, 400)}, "from 1 to 100"),
        ({"strangers": 1.5}, "between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        World(Passages("One."), **settings)


def test_a_text_with_too_few_sentences_for_a_split_is_a_clear_error():
    with pytest.raises(ConfigError, match="give more text"):
        for split in ("train", "held-out"):
            World(Passages("There is one only."), split=split).sentence(random.Random(0))
