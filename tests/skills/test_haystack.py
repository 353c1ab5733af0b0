import random

import pytest

from trimtab.evaluation.corpus import shipped_text
from trimtab.skills.haystack import Haystack
from trimtab.skills.texts import breaks

TEXT = 'He came. "Who is it?" she asked. Mr. Bell left! "No," he said. It rained.'


def test_breaks_are_where_sentences_start():
    starts = [TEXT[b:].split()[0] for b in breaks(TEXT)]
    assert starts == ['"Who', "Mr.", '"No,"', "It"]


def test_haystack_is_a_passage_of_whole_sentences_within_the_asked_size():
    source = shipped_text()
    for seed in range(20):
        hay = Haystack.draw(source, random.Random(seed), characters=600).text
        assert hay in source
        assert 200 < len(hay) <= 600
        start = source.index(hay)
        assert start in breaks(source)


def test_a_short_source_is_repeated():
    hay = Haystack.draw(TEXT + " ", random.Random(0), characters=500).text
    assert 300 < len(hay) <= 500


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0.0, "X. One is here. Two is there. Three is gone."),
        (0.3, "One is here. X. Two is there. Three is gone."),
        (1.0, "One is here. Two is there. Three is gone. X."),
    ],
)
def test_insert_takes_the_nearest_sentence_boundary(depth, expected):
    assert Haystack("One is here. Two is there. Three is gone.").insert("X.", depth=depth).text == expected
