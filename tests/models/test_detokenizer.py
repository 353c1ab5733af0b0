"""Streaming text: its pieces joined are the decoded whole, and no piece ends in half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from models.tokenizer_zoo import KINDS, TEXTS, with_decoder
from trimtab.errors import RequestError
from trimtab.models.detokenizer import Detokenizer, _table, _WindowStream
from trimtab.models.hub import find_folder
from trimtab.models.tokenizer import Tokenizer

OTHER_DECODERS = {
    "metaspace": lambda: with_decoder(decoders.Metaspace()),
    "metaspace-never": lambda: with_decoder(decoders.Metaspace(prepend_scheme="never")),
    "metaspace-bytes": lambda: with_decoder(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
    "joined-by-spaces": lambda: with_decoder(None),
    "word-pieces": lambda: with_decoder(decoders.WordPiece(prefix="##", cleanup=True)),
    "suffix": lambda: with_decoder(decoders.BPEDecoder(suffix="</s>")),
}
ALL = {name: make for name, (make, _, _) in KINDS.items()} | OTHER_DECODERS
TOKENIZERS = {name: Tokenizer(make()) for name, make in ALL.items()}


def pieces_of(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip)
    return [detokenizer.push(i) for i in ids] + [detokenizer.flush()]


def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Random ids, with more than their share of single bytes, special tokens, spaces and unknown ids."""
    backend = tokenizer.backend
    odd = [i for i in range(tokenizer.vocab_size) if len(backend.decode([i], False)) <= 1]
    special = sorted(tokenizer.special_ids) or [0]
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    spaces = [i for t in ("▁", "▁▁", "Ġ", "<0x20>", "<0x0A>") if (i := backend.token_to_id(t)) is not None]
    unknown = st.sampled_from([tokenizer.vocab_size, tokenizer.vocab_size + 7])
    one = st.one_of(
        any_id, st.sampled_from(odd or [0]), st.sampled_from(special), st.sampled_from(spaces), unknown
    )
    encoded = st.text(max_size=8).map(lambda t: backend.encode(t, add_special_tokens=False).ids)
    return st.lists(st.one_of(one.map(lambda i: [i]), encoded), max_size=20).map(
        lambda lists: [i for ids in lists for i in ids]
    )


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_join_to_the_decoded_whole(name, data, skip):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(id_lists(tokenizer))
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", [n for n in KINDS])
@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_the_general_way_agrees_with_the_tables(name, data, skip):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(id_lists(tokenizer))
    stream = _WindowStream(tokenizer, skip)
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", ALL)
@given(text=st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_piece_holds_half_a_character(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces_of(tokenizer, ids))


def test_the_families_take_the_fast_ways():
    assert all(_table(TOKENIZERS[name], True) is not None for name in KINDS)
    assert all(_table(TOKENIZERS[name], True) is None for name in OTHER_DECODERS)


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_text_comes_as_soon_as_it_is_certain(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("the dog and the other one", add_special_tokens=False)
    assert not any((tokenizer.id_to_token(i) or "").startswith("<0x") for i in ids)
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for n, token in enumerate(ids, start=1):
        shown += detokenizer.push(token)
        assert shown == tokenizer.decode(ids[:n])


def test_a_character_of_several_byte_tokens_comes_whole():
    tokenizer = TOKENIZERS["llama3"]
    ids = tokenizer.encode("ไ", add_special_tokens=False)
    assert len(ids) > 1
    assert pieces_of(tokenizer, ids) == [""] * (len(ids) - 1) + ["ไ", ""]


def test_invalid_bytes_do_not_swallow_what_follows():
    tokenizer = TOKENIZERS["llama3"]
    half = tokenizer.encode("ไ", add_special_tokens=False)[:1]
    ids = half + tokenizer.encode("the", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids)) == "\ufffdthe"


def test_flush_begins_anew():
    for tokenizer in TOKENIZERS.values():
        detokenizer = Detokenizer(tokenizer)
        ids = tokenizer.encode(TEXTS[5])
        texts = ["".join([detokenizer.push(i) for i in ids] + [detokenizer.flush()]) for _ in range(2)]
        assert texts[0] == texts[1] == tokenizer.decode(ids)


def test_streams_do_not_share_state():
    tokenizer = TOKENIZERS["llama2"]
    ids = tokenizer.encode(TEXTS[5])
    streams = [Detokenizer(tokenizer) for _ in range(2)]
    texts = ["", ""]
    for token in ids:
        for i, stream in enumerate(streams):
            texts[i] += stream.push(token)
    assert [t + s.flush() for t, s in zip(texts, streams, strict=True)] == [tokenizer.decode(ids)] * 2


def test_no_tokenizer():
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        Detokenizer(Tokenizer(None))


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.from_folder(find_folder(None))


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 4100), max_size=60), skip=st.booleans())
def test_shipped_model(shipped, ids, skip):
    assert "".join(pieces_of(shipped, ids, skip)) == shipped.decode(ids, skip)
