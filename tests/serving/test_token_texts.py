"""Texts, bytes and offsets of single tokens, for the families' kinds of tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from models.tokenizer_zoo import KINDS, with_decoder
from trimtab.models.tokenizer import Tokenizer
from trimtab.serving.token_texts import TokenTexts

TOKENIZERS = {name: Tokenizer(make()) for name, (make, _, _) in KINDS.items()} | {
    "metaspace": Tokenizer(with_decoder(decoders.Metaspace())),
    "metaspace-bytes": Tokenizer(
        with_decoder(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=20))
def test_bytes_of_tokens_join_to_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    if "\ufffd" in whole:
        return
    joined = b"".join(texts.raw(i) or b"" for i in ids).decode()
    # A text's first space stands for its beginning, and decoders drop it.
    assert joined.endswith(whole) and not joined.removesuffix(whole).strip(" ")
    offsets = texts.offsets(skip_special_tokens=False).take(ids)
    for i, offset in zip(ids, offsets, strict=True):
        word = texts.text(i)
        is_byte = (tokenizer.id_to_token(i) or "").startswith("<0x")
        if not word.startswith("bytes:") and offset:
            assert whole.find(word, offset) >= offset if is_byte else whole.startswith(word, offset)


def test_ids_that_stand_for_nothing() -> None:
    for tokenizer in TOKENIZERS.values():
        assert TokenTexts(tokenizer).raw(tokenizer.vocab_size + 3) == b""


def test_without_a_tokenizer() -> None:
    texts = TokenTexts(None)
    assert (texts.raw(7), texts.text(7)) == (None, "token_id:7")
    assert texts.offsets(skip_special_tokens=True).take([7, 8]) == [0, 0]
