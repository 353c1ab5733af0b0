import gzip
import sys

import pytest

from training.data.small import TEXTS, write_lines, write_table
from trimtab.errors import ConfigError
from trimtab.training.data import readers
from trimtab.training.data.readers import Problems, iterate_records, read_records

RECORDS = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".arrow"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, suffix):
    write = write_lines if suffix.startswith(".jsonl") else write_table
    path = write(tmp_path / f"data{suffix}", RECORDS)
    assert list(read_records(path)) == RECORDS
    # Several frames or members after each other are one file.
    if suffix in (".jsonl.zst", ".jsonl.gz"):
        path.write_bytes(path.read_bytes() * 2)
        assert list(read_records(path)) == RECORDS * 2


def test_what_datasets_and_a_json_array_hold_is_read(tmp_path):
    array = tmp_path / "data.json"
    array.write_text('[{"text": "a"},\n {"text": "b"}]', encoding="utf-8")
    assert [r["text"] for r in read_records(array)] == ["a", "b"]
    lines = write_lines(tmp_path / "lines.json", RECORDS)
    assert list(read_records(lines)) == RECORDS


def test_a_table_is_read_by_columns_only_where_it_has_them_all(tmp_path):
    for suffix in ("parquet", "arrow"):
        path = write_table(tmp_path / f"data.{suffix}", RECORDS)
        assert [r.values for r in iterate_records(path, ["text"])] == [{"text": t} for t in TEXTS]
        assert [r.values for r in iterate_records(path, ["other"])] == RECORDS


def test_lines_longer_than_a_block_and_a_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.training.data.blocks._BLOCK", 7)
    path = write_lines(tmp_path / "data.jsonl", RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(read_records(path)) == RECORDS


def test_a_text_file_is_one_document_and_a_long_one_is_cut_at_lines(tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    path.write_text("one\ntwo\nthree\nfour\nfive\nsix\n", encoding="utf-8")
    assert [r["text"] for r in read_records(path)] == [path.read_text()]
    monkeypatch.setattr(readers, "TEXT_DOCUMENT", 10)
    parts = [r["text"] for r in read_records(path)]
    assert "".join(parts) == path.read_text() and len(parts) > 1 and parts[0] == "one\ntwo\n"


def test_broken_lines_are_named_or_skipped_and_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n[1, 2]\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match=r"data.jsonl, line 3 is no JSON.*on_error: skip"):
        list(read_records(path))
    problems = Problems(skip=True)
    assert [r.number for r in iterate_records(path, problems=problems)] == [1, 5]
    assert problems.count == 2 and "line 3" in str(problems.first)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
def test_a_compressed_file_that_breaks_off_or_is_damaged(tmp_path, suffix):
    path = write_lines(tmp_path / f"data{suffix}", RECORDS * 50)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match=r"data.jsonl\.\w+ breaks off in the middle"):
        list(read_records(path))
    path.write_bytes(b"not compressed at all")
    with pytest.raises(ConfigError, match=r"data\.jsonl"):
        list(read_records(path))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_damaged_table(tmp_path, suffix):
    path = write_table(tmp_path / f"data{suffix}", RECORDS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=rf"data{suffix} is damaged"):
        list(read_records(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_an_empty_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(ConfigError, match=rf"{name} is empty"):
        list(read_records(path))


def test_another_encoding_is_named_by_line_and_byte_and_can_be_set(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + '{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"line 2: the byte 0xe9 at 27 is not utf-8.*encoding: latin-1"):
        list(read_records(path))
    assert [r.values["text"] for r in iterate_records(path, encoding="latin-1")] == ["a", "café"]
    path.write_bytes('{"text": "你好"}\n'.encode("utf-16"))
    assert [r.values["text"] for r in iterate_records(path, encoding="utf-16")] == ["你好"]
    with pytest.raises(ConfigError, match="'encoding' is 'latin-one'"):
        list(iterate_records(path, encoding="latin-one"))


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.jsonl.zst", "zstandard")]
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"reading .*{name} needs the package {package}: pip install"):
        list(read_records(tmp_path / name))
