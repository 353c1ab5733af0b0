import json
import multiprocessing
import resource

import numpy as np
import pytest

from training.data.small import CHAT, TEXTS, build_and_tell, tokenizer, write_lines
from trimtab.errors import ConfigError, OutputError
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data import store_cache
from trimtab.training.data.formats import ChatFormat, TextFormat
from trimtab.training.data.segments import Segment, all_trained
from trimtab.training.data.store_cache import Reading, cached_store
from trimtab.training.data.token_store import TokenStore

EOS = 2


def build(path, cache, reading=Reading(), form=TextFormat(last=EOS), lines=None):  # noqa: B008
    return cached_store([path], form, tokenizer(), reading, cache, None if lines is None else lines.append)


def test_documents_come_back_as_their_tokens(tmp_path):
    path = write_lines(tmp_path / "books.jsonl.zst", [{"text": t} for t in TEXTS])
    lines = []
    store = build(path, tmp_path / "cache", lines=lines)
    assert store.folder.name.startswith("books-") and store.trained is None and store.labels is None
    for i, text in enumerate(TEXTS):
        assert store.document(i).tokens.tolist() == [*tokenizer().encode(text, add_special_tokens=False), EOS]
        assert store.document(i).trained.all()
    assert store.largest == store.tokens.max() and len(lines) == 1 and "3 documents" in lines[0]
    assert store.about["records"] == 3 and store.about["skipped"] == 0


def test_a_store_is_made_once_until_something_that_matters_changes(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "books.jsonl", [{"text": t} for t in TEXTS])
    first = build(path, tmp_path).folder
    with monkeypatch.context() as patched:
        patched.setattr(store_cache, "encode", None)
        assert build(path, tmp_path).folder == first
    assert build(path, tmp_path, Reading(max_tokens=30)).folder != first
    assert build(path, tmp_path, form=TextFormat()).folder != first
    spoken = Tokenizer(tokenizer().backend, special_tokens=tokenizer().special_tokens)
    assert cached_store([path], TextFormat(last=EOS), spoken, Reading(), tmp_path).folder != first
    write_lines(path, [{"text": t} for t in TEXTS[:2]])
    assert len(build(path, tmp_path)) == 2


def test_masks_are_kept_from_the_first_masked_document_on(tmp_path):
    parts = [
        all_trained(np.arange(3)),
        Segment(np.arange(4), np.array([0, 1, 0, 1], bool)),
        all_trained(np.arange(2)),
    ]
    store = TokenStore.write(tmp_path / "store", [*parts, all_trained(np.arange(0))], 10, {})
    assert len(store) == 3
    for i, part in enumerate(parts):
        assert np.array_equal(store.document(i).trained, part.trained)


def test_records_that_cannot_be_used_are_named_or_counted(tmp_path):
    records = [{"text": TEXTS[0]}, {"body": "x"}, {"text": 3}, {"text": "\ud800"}, {"text": ""}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(ConfigError, match=r"data.jsonl, line 2: no 'text' \(there is 'body'\); set 'text'"):
        build(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("data-*"))
    lines = []
    store = build(path, tmp_path / "cache", Reading(on_error="skip"), lines=lines)
    assert len(store) == 1 and store.about["skipped"] == 4 and store.about["records"] == 5
    assert "4 skipped" in lines[-1] and "line 2" in lines[-1]


def test_a_conversation_the_template_cannot_take_is_named(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}])
    with pytest.raises(ConfigError, match=r"chats.jsonl, line 2: .*no message with the role 'assistant'"):
        build(path, tmp_path, form=ChatFormat())


def test_long_documents_are_counted(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"text": t} for t in TEXTS])
    lengths = [len(tokenizer().encode(t, add_special_tokens=False)) + 1 for t in TEXTS]
    limit = sorted(lengths)[1]
    store = build(path, tmp_path, Reading(max_tokens=limit))
    assert len(store) == 2 and store.about["dropped"] == 1
    cut = build(path, tmp_path, Reading(max_tokens=limit, too_long="cut_right"))
    assert len(cut) == 3 and cut.about["cut"] == 1 and max(np.diff(cut.ends, prepend=0)) == limit
    with pytest.raises(ConfigError, match="no document that can be trained on"):
        build(path, tmp_path, Reading(max_tokens=2))
    with pytest.raises(ConfigError, match="'max_tokens' is 1"):
        Reading(max_tokens=1)


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"text": TEXTS[0] * 300}])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, limit[1]))
    try:
        with pytest.raises(OutputError, match="token store could not be written to"):
            build(path, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(build(path, tmp_path / "cache")) == 1


def test_what_a_killed_builder_left_is_swept_and_damage_is_told(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"text": TEXTS[0]}])
    folder = build(path, tmp_path / "cache").folder
    (folder / "tokens.bin").write_bytes(b"xx")
    with pytest.raises(ConfigError, match="is damaged: its files disagree; remove the folder"):
        build(path, tmp_path / "cache")
    (folder / "store.json").unlink()
    with pytest.raises(ConfigError, match=r"no token store: it has no store\.json"):
        TokenStore.open(folder)
    folder.rename(folder.parent / f".{folder.name}.abcd")
    build(path, tmp_path / "cache")
    assert not list(folder.parent.glob(".*abcd"))


def test_a_cache_that_cannot_be_written(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"text": TEXTS[0]}])
    with pytest.raises(OutputError, match="set 'cache' to a folder"):
        build(path, path)


@pytest.mark.slow
def test_builders_at_the_same_time_make_one_store(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"text": f"{i} {TEXTS[0]}"} for i in range(3_000)])
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=build_and_tell, args=(path, tmp_path / "c", answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert len({(name, tokens) for name, tokens, _ in found}) == 1
    assert sorted(lines > 0 for *_, lines in found) == [False, False, True]
