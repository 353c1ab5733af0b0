"""Token ids to text while they arrive: never half a character, and nothing lost.

The pieces that `push` and `flush` return, joined, are exactly `tokenizer.decode(ids)`. A piece is held
back while later tokens could still change it: an unfinished character, or (SentencePiece-style
vocabularies) a run of byte tokens, which as a whole is either valid text or all replacement signs.

Three ways, picked by the tokenizer's decoder:
- ByteLevel (Llama 3, Qwen, the shipped model): a table from id to bytes, and incremental UTF-8.
- SentencePiece with byte fallback (Llama 2, Mistral): a table from id to text or one byte.
- anything else: decode a window of the last few tokens and emit what is new.
"""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from typing import Any, Final
from weakref import WeakKeyDictionary

from trimtab.models.tokenizer import Tokenizer, decoder_steps

REPLACEMENT: Final = "\ufffd"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WINDOW_TOKENS: Final = 64
_ABSENT: Final = -1


class Detokenizer:
    """Streaming text of one sequence of tokens.

    `push(token_id)` returns the text that became certain, possibly empty; `flush()` returns what was held
    back and starts afresh. Raises RequestError on construction where the model has no tokenizer.
    """

    __slots__ = ("flush", "push")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        table = _table(tokenizer, skip_special_tokens)
        stream: _ByteLevelStream | _SentencePieceStream | _WindowStream
        if isinstance(table, _ByteLevelTable):
            stream = _ByteLevelStream(table)
        elif isinstance(table, _SentencePieceTable):
            stream = _SentencePieceStream(table)
        else:
            stream = _WindowStream(tokenizer, skip_special_tokens)
        # Bound methods in slots: one call a token instead of two.
        self.push = stream.push
        self.flush = stream.flush


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes a token stands for inside a text, perhaps a part of a character; none for an unknown id."""
    table = _table(tokenizer, False)
    if table is None:
        byte = _BYTE_TOKEN.fullmatch(tokenizer.id_to_token(token_id) or "")
        if byte and any(step["type"] == "ByteFallback" for step in decoder_steps(tokenizer) or []):
            return bytes([int(byte[1], 16)])
        # Alone it would be the text's first, which loses its space with some decoders.
        first, both = (tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return both[len(first) :].encode()
    entries = table.raw if isinstance(table, _ByteLevelTable) else table.piece
    if not 0 <= token_id < len(entries):
        return b""
    entry = entries[token_id]
    if isinstance(entry, int):
        return b"" if entry == _ABSENT else bytes([entry])
    return entry.encode() if isinstance(entry, str) else entry


class _ByteLevelTable:
    """Per token id: its bytes, and its text where the bytes are whole characters (else None)."""

    __slots__ = ("raw", "text")

    def __init__(self, tokens: list[str | None]) -> None:
        to_byte = _byte_level_alphabet()
        self.raw: list[bytes] = []
        self.text: list[str | None] = []
        for token in tokens:
            if token is None:
                raw = b""
            else:
                try:
                    raw = bytes([to_byte[char] for char in token])
                except KeyError:
                    # A token outside the alphabet (added by hand) stands for itself.
                    raw = token.encode("utf-8")
            self.raw.append(raw)
            try:
                self.text.append(raw.decode("utf-8"))
            except UnicodeDecodeError:
                self.text.append(None)


class _ByteLevelStream:
    __slots__ = ("_held", "_raw", "_text")

    def __init__(self, table: _ByteLevelTable) -> None:
        self._raw = table.raw
        self._text = table.text
        self._held = b""

    def push(self, token_id: int) -> str:
        if not 0 <= token_id < len(self._text):
            return ""
        if not self._held:
            text = self._text[token_id]
            if text is not None:
                return text
        data = self._held + self._raw[token_id]
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def flush(self) -> str:
        text = self._held.decode("utf-8", "replace")
        self._held = b""
        return text


class _SentencePieceTable:
    """Per token id: its text, or the value of a byte token, or ABSENT for an id that stands for nothing.

    An empty text is not absent: it still ends a run of bytes.
    """

    __slots__ = ("piece", "strip")

    def __init__(self, tokens: list[str | None], strip: int) -> None:
        self.strip = strip
        self.piece: list[str | int] = []
        for token in tokens:
            if token is None:
                self.piece.append(_ABSENT)
                continue
            byte = _BYTE_TOKEN.fullmatch(token)
            self.piece.append(int(byte[1], 16) if byte else token.replace("▁", " "))


class _SentencePieceStream:
    __slots__ = ("_piece", "_run", "_strip", "_to_strip")

    def __init__(self, table: _SentencePieceTable) -> None:
        self._piece = table.piece
        self._strip = table.strip
        self._to_strip = table.strip
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        if not 0 <= token_id < len(self._piece):
            return ""
        piece = self._piece[token_id]
        if isinstance(piece, int):
            if piece != _ABSENT:
                self._run.append(piece)
            return ""
        if self._run:
            piece = self._end_run() + piece
        return self._stripped(piece) if self._to_strip and piece else piece

    def flush(self) -> str:
        text = self._stripped(self._end_run())
        self._to_strip = self._strip
        return text

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        """The first spaces of the whole text stand for its beginning and are dropped, at most `strip`."""
        while self._to_strip and text:
            if text[0] != " ":
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


class _WindowStream:
    """Decodes the last few tokens together with some before them, whose text is known already.

    Right for decoders in which a token's text may depend on its neighbours, but not on tokens far away.
    """

    __slots__ = ("_byte_fallback", "_decode", "_read", "_skip", "_token", "_window")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        backend = tokenizer.backend
        self._decode = lambda ids: backend.decode(ids, skip_special_tokens=False)
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._token = backend.id_to_token
        self._byte_fallback = any(s["type"] == "ByteFallback" for s in decoder_steps(tokenizer) or [])
        self._window: list[int] = []
        self._read = 0  # the window's first _read tokens are emitted already

    def push(self, token_id: int) -> str:
        if token_id in self._skip or token_id < 0:
            return ""
        token = self._token(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return ""
        new = self._new_text()
        if new.endswith(REPLACEMENT) and len(self._window) - self._read < _WINDOW_TOKENS:
            return ""
        self._forget()
        return new

    def flush(self) -> str:
        new = self._new_text() if self._read < len(self._window) else ""
        self._window.clear()
        self._read = 0
        return new

    def _new_text(self) -> str:
        known = self._decode(self._window[: self._read]) if self._read else ""
        return self._decode(self._window)[len(known) :]

    def _forget(self) -> None:
        # The window must keep some token with text, else the next one would be decoded as the text's first.
        recent = self._window[self._read :]
        if self._decode(recent):
            self._window = recent
        self._read = len(self._window)


_TABLES: WeakKeyDictionary[Tokenizer, dict[bool, Any]] = WeakKeyDictionary()


def _table(tokenizer: Tokenizer, skip: bool) -> _ByteLevelTable | _SentencePieceTable | None:
    """The id table of a tokenizer, made once for each tokenizer object; None: use the window."""
    tables = _TABLES.setdefault(tokenizer, {})
    if skip not in tables:
        tables[skip] = _build_table(tokenizer, skip)
    return tables[skip]


def _build_table(tokenizer: Tokenizer, skip: bool) -> _ByteLevelTable | _SentencePieceTable | None:
    steps = decoder_steps(tokenizer)
    if steps is None:
        return None
    kinds = [step["type"] for step in steps]
    skipped = tokenizer.special_ids if skip else frozenset()
    token_of = tokenizer.backend.id_to_token
    tokens = [None if i in skipped else token_of(i) for i in range(tokenizer.vocab_size)]
    if kinds == ["ByteLevel"]:
        return _ByteLevelTable(tokens)
    replaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == replaces:
        count = steps[3]["start"] if len(steps) == 4 and kinds[3] == "Strip" else 0
        strip = {"type": "Strip", "content": " ", "start": count, "stop": 0}
        if steps[3:] in ([], [strip]):
            return _SentencePieceTable(tokens, count)
    return None


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a printable character; this maps the character back.

    Printable Latin-1 characters stand for their own byte; the other bytes, in order, for U+0100 onwards.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    alphabet = {chr(byte): byte for byte in own}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet
