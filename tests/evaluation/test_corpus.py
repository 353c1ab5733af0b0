import pytest

from trimtab.errors import ConfigError
from trimtab.evaluation.corpus import load_text, shipped_text


def test_shipped_text_is_prose_of_the_promised_size():
    text = shipped_text()
    assert 150_000 < len(text.encode()) < 250_000
    assert "\ufffd" not in text and "\r" not in text


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
