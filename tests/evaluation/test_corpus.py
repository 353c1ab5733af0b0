import random

import pytest

from trimtab.errors import ConfigError
from trimtab.evaluation.corpus import Haystack, breaks, load_text, shipped_text

TEXT = 'He came. "Who is it?" she asked. Mr. Bell left! "No," he said. It rained.'


def test_shipped_text_is_prose_of_the_promised_size():
    text = shipped_text()
    assert 150_000 < len(text.encode()) < 250_000
    assert "\ufffd" not in text and "\r" not in text


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


def test_load_text_reads_files_and_finds_wikitext(tmp_path):
    (tmp_path / "my.txt").write_text("Grüße", encoding="utf-8")
    assert load_text(str(tmp_path / "my.txt")) == "Grüße"
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "test.txt").write_text("= Title =", encoding="utf-8")
    assert load_text("wikitext2", str(tmp_path)) == "= Title ="
    assert load_text("shipped") == shipped_text()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("no.txt", None, "neither 'shipped'"),
        ("empty.txt", b" \n", "is empty"),
        ("latin.txt", "Grüße".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_is_a_clear_error(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        load_text(str(tmp_path / name))


def test_missing_wikitext_names_the_option_that_helps(tmp_path):
    with pytest.raises(ConfigError, match="folder=PATH"):
        load_text("wikitext2", str(tmp_path))
