import hashlib
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from training.data.small import CHAT, TEXTS, tokenizer, write_lines
from trimtab.errors import ConfigError
from trimtab.training.data.mixture import Mixture
from trimtab.training.data.segments import all_trained
from trimtab.training.data.sources import skills as skills_source
from trimtab.training.data.sources.build import (
    SourceContext,
    build_mixture,
    build_source,
    validation_segments,
)
from trimtab.training.data.sources.documents import Documents
from trimtab.training.data.token_store import TokenStore

LENGTHS = (5, 1, 23, 8, 40)


@pytest.fixture
def store(tmp_path):
    ends = np.cumsum((0, *LENGTHS))
    documents = [all_trained(np.arange(a, b)) for a, b in itertools.pairwise(ends)]
    return TokenStore.write(tmp_path / "store", documents, 100, {})


@pytest.fixture
def context(tmp_path):
    write_lines(tmp_path / "books.jsonl", [{"text": t * 3} for t in TEXTS])
    return SourceContext(tokenizer(), tokenizer().vocab_size, tmp_path, tmp_path / "cache", 0, 16)


def take(source, count):
    return [source.next().tokens.tolist() for _ in range(count)]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_has_every_token_once_in_windows_that_keep_to_documents(store, epoch):
    source = Documents(store, 8, seed=3, first=99)
    source.restore({"epoch": epoch, "cursor": 0})
    windows = take(source, len(source))
    assert all(w[0] == 99 and 2 <= len(w) <= 8 for w in windows)
    assert sorted(t for w in windows for t in w[1:]) == list(range(sum(LENGTHS)))
    ends = np.cumsum(LENGTHS)
    assert all(np.searchsorted(ends, w[1], "right") == np.searchsorted(ends, w[-1], "right") for w in windows)
    assert source.state() == {"epoch": epoch, "cursor": len(source), "tokens": sum(LENGTHS)}
    source.next()
    assert source.state() == {"epoch": epoch + 1, "cursor": 1, "tokens": sum(LENGTHS)}


def test_the_order_is_that_of_earlier_versions_so_that_runs_go_on(store):
    source = Documents(store, 7, seed=5, first=99)
    taken = take(source, 60)
    assert source.epoch > 1
    assert hashlib.sha256(str(taken).encode()).hexdigest()[:16] == "819b69f101e671c0"


def test_a_restored_source_goes_on_with_the_same_segments(store):
    for window in (6, None):
        source, other = Documents(store, window, seed=1), Documents(store, window, seed=1)
        take(source, 30)
        other.restore(source.state())
        assert take(other, 40) == take(source, 40)
    with pytest.raises(ConfigError, match="has only 5: the data or 'window' changed"):
        Documents(store, None, seed=1).restore({"epoch": 0, "cursor": 6})
    with pytest.raises(ConfigError, match=r"has 77 tokens.*with 76: the data changed"):
        Documents(store, None, seed=1).restore({"epoch": 0, "cursor": 1, "tokens": 76})
    with pytest.raises(ConfigError, match="'window' is 1"):
        Documents(store, 1, seed=1)


def test_a_mixture_keeps_shares_of_tokens_at_any_moment_and_goes_on(store):
    def make():
        return Mixture([Documents(store, w, seed=w) for w in (5, 8)], [3, 1], ["a", "b"])

    mixture = make()
    for _ in range(200):
        mixture.next()
        assert abs(mixture.taken[0] - 0.75 * sum(mixture.taken)) <= 8
    other = make()
    other.restore(mixture.state())
    assert take(other, 50) == take(mixture, 50)
    with pytest.raises(ConfigError, match="2 sources of data and the recipe has 1"):
        Mixture([Documents(store, 5, seed=0)], [1]).restore(mixture.state())
    for weights in ([-1, 1], ["1", 1], [0, 0], [float("nan"), 1]):
        with pytest.raises(ConfigError, match="weight"):
            Mixture([mixture, mixture], weights)


def test_sources_of_all_file_kinds_are_built(context, tmp_path):
    write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    write_lines(tmp_path / "pairs.jsonl", [{"question": "1 + 2", "answer": " = 3"}])
    write_lines(tmp_path / "labels.jsonl", [{"text": "fine", "label": "good"}])
    mixture = build_mixture(
        [
            {"kind": "documents", "paths": ["books.jsonl"], "weight": 2},
            {"kind": "chat", "paths": ["chats.jsonl"], "max_tokens": 100, "name": "talk"},
            {"kind": "completions", "paths": ["pairs.jsonl"], "prompt": "question", "completion": "answer"},
            {"kind": "labelled", "paths": ["labels.jsonl"], "labels": ["bad", "good"], "weight": 0.5},
        ],
        context,
    )
    assert mixture.names == ["documents", "talk", "completions", "labelled"]
    documents, chat, pairs, labels = (source.next() for source in mixture.sources)
    bos, eos = tokenizer().bos_id, tokenizer().token_to_id("<|eos|>")
    assert documents.tokens[0] == bos and 2 <= len(documents) <= 16 and not documents.trained[0]
    assert chat.tokens[0] == bos and 0 < chat.trained.sum() < len(chat)
    assert pairs.tokens[0] == bos and pairs.tokens[-1] == eos and pairs.trained[-1]
    assert labels.label == 1 and labels.tokens[0] == bos
    whole = build_source(
        {"kind": "documents", "paths": ["books.jsonl"], "first": "none", "end": False}, context
    )
    assert all(t < 400 for t in whole.next().tokens) and isinstance(whole, Documents) and whole.first is None
    # A store that is there already can be named, by the recipe's folder or by its place.
    named = build_source({"kind": "documents", "store": str(whole.store.folder), "window": 8}, context)
    assert isinstance(named, Documents) and named.window == 8 and named.first == bos


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "document", "paths": ["books.jsonl"]}, "unknown kind 'document'. Did you mean 'documents'"),
        ({"paths": ["books.jsonl"]}, "a source has no 'kind'. Known: chat, completions"),
        ({"kind": "documents", "path": ["books.jsonl"]}, "unknown option 'path' .*Did you mean 'paths'"),
        ({"kind": "documents", "paths": ["books.jsonl"], "window": "long"}, "'window' .* is 'long'"),
        ({"kind": "documents", "paths": ["books.jsonl"], "store": "s"}, "both 'paths' and 'store'"),
        ({"kind": "documents"}, "'paths' is empty"),
        (
            {"kind": "chat", "paths": ["books.jsonl"]},
            r"books.jsonl, line 1: no 'messages' \(there is 'text'\)",
        ),
        ({"kind": "skills"}, "needs prose: give either 'texts'"),
        ({"kind": "skills", "texts": ["books.jsonl"], "skills": {"json": 1, "jsn": 1}}, "no skill 'jsn'"),
        ({"kind": "skills", "texts": ["books.jsonl"], "world": {"split": "held-out"}}, "leave them out"),
        ({"kind": "skills", "texts": ["books.jsonl"], "world": {"secret": 3}}, "unknown option 'secret'"),
    ],
)
def test_mistakes_in_a_source_are_named(context, spec, message):
    with pytest.raises(ConfigError, match=message):
        build_source(spec, context)


def test_token_ids_the_model_has_no_row_for_and_foreign_stores(context, store):
    small = SourceContext(tokenizer(), 20, context.folder, context.cache, window=16)
    with pytest.raises(ConfigError, match=r"token id \d+, but the model's vocab_size is 20"):
        build_source({"kind": "documents", "paths": ["books.jsonl"]}, small)
    foreign = TokenStore.write(
        store.folder.parent / "foreign", [all_trained(np.arange(9))], 9, {"tokenizer": "x"}
    )
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        build_source({"kind": "documents", "store": foreign.folder.name}, context)
    with pytest.raises(ConfigError, match="the mixture is empty"):
        build_mixture([], context)


def test_validation_is_the_same_in_every_run_and_counts_its_bytes(context):
    spec = {"kind": "documents", "paths": ["books.jsonl"], "windows": 1000}
    every = validation_segments(spec, context)
    # All windows, in order: their text is the files' text, and bos and eos stand for none of it.
    assert every.text_bytes == sum(len((t * 3).encode()) for t in TEXTS)
    some = validation_segments(spec | {"windows": 4}, SourceContext(**_fields(context) | {"seed": 7}))
    assert len(some.segments) == 4 and some.text_bytes < every.text_bytes
    all_of_them = [s.tokens.tolist() for s in every.segments]
    found = [all_of_them.index(s.tokens.tolist()) for s in some.segments]
    assert found == sorted(found) and found[-1] > len(all_of_them) // 2
    with pytest.raises(ConfigError, match="'windows' of the validation is 0"):
        validation_segments(spec | {"windows": 0}, context)


def _fields(context):
    return {name: getattr(context, name) for name in SourceContext.__slots__}


def test_exercises_are_conversations_and_those_for_validation_are_held_out(context, monkeypatch):
    write_lines(context.folder / "prose.jsonl", [{"text": "It was 9 o'clock. The fox slept. " * 150}] * 3)
    skills = {"passkey": 1, "json": 1, "arithmetic": 1}
    spec = {"kind": "skills", "texts": ["prose.jsonl"], "skills": skills, "max_tokens": 700}
    spec |= {"world": {"characters": [100, 300]}}
    source, other = build_source(spec, context), build_source(spec, context)
    seen = [source.next() for _ in range(12)]
    assert all(len(s) <= 700 and s.trained.any() for s in seen)
    take(other, 6)
    again = build_source(spec, context)
    again.restore(other.state())
    assert take(again, 6) == [s.tokens.tolist() for s in seen[6:]]
    sums = spec | {"skills": {"arithmetic": 1}}
    texts = {
        tokenizer().decode(s.tokens) for s in validation_segments(sums | {"windows": 8}, context).segments
    }
    trained = build_source(sums, context)
    assert not texts & {tokenizer().decode(trained.next().tokens) for _ in range(16)}
    # Prose of long exercises is learnt, questions of short ones are not.
    long = build_source(spec | {"skills": {"passkey": 1}}, context).next()
    assert long.trained.all() and not trained.next().trained.all()
    monkeypatch.setattr(skills_source, "_DRAWS", 3)
    with pytest.raises(ConfigError, match="in a row have more than 12 tokens"):
        build_source(spec | {"max_tokens": 12}, context).next()


def test_prose_for_exercises_begins_with_a_sentence_and_keeps_to_its_document(context):
    texts = ["Naïve foxes sleep. " * 200, "Dogs bark at night, 你好. " * 200]
    write_lines(context.folder / "prose.jsonl", [{"text": t} for t in texts])
    prose = build_source({"kind": "skills", "texts": ["prose.jsonl"]}, context).world.texts  # type: ignore[attr-defined]
    rng = random.Random(0)
    for _ in range(50):
        found = prose.excerpt(rng, 200)
        assert 100 < len(found) <= 200 and found.startswith(("Naïve", "Dogs")) and found.endswith(".")
        assert sum(found in text for text in texts) == 1


def test_a_segment_is_not_longer_than_what_the_model_takes(context):
    spec = {"kind": "documents", "paths": ["books.jsonl"]}
    with pytest.raises(ConfigError, match="is 16 tokens and the model's context 15"):
        build_source(spec, replace(context, longest=15))
    for wish in ({"window": 17}, {"kind": "chat", "max_tokens": 17}):
        with pytest.raises(ConfigError, match="is 17 tokens and the model's context 16"):
            build_source(spec | wish, replace(context, longest=16))
    with pytest.raises(ConfigError, match="'window' is 0"):
        build_source(spec | {"window": 0}, context)


def test_validation_without_a_token_to_predict_is_refused(context):
    write_lines(context.folder / "one.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match="no token to predict"):
        validation_segments(
            {"kind": "documents", "paths": ["one.jsonl"], "first": "none", "end": False}, context
        )


def test_a_weight_that_is_none_is_refused_before_files_are_read(context):
    missing = {"kind": "documents", "paths": ["missing.jsonl"]}
    for weights, message in ((["a", 1], "'weight' of a source is 'a'"), ([0, 0], "has the weight 0")):
        with pytest.raises(ConfigError, match=message):
            build_mixture([missing | {"weight": weight} for weight in weights], context)
    with pytest.raises(ConfigError, match=r"unknown kind \['chat'\]"):
        build_mixture([{"kind": ["chat"]}], context)
