"""The text and the bytes of single tokens, for reports of log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.models.detokenizer import Detokenizer, token_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.models.tokenizer import Tokenizer


class TokenTexts:
    """Texts of one model's tokens; without a tokenizer a token is called `token_id:17`."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._raw: dict[int, bytes] = {}

    def raw(self, token_id: int) -> bytes | None:
        """The token's bytes, which may be a part of a character; None where it has none."""
        if self._tokenizer is None:
            return None
        raw = self._raw.get(token_id)
        if raw is None:
            raw = self._raw[token_id] = token_bytes(self._tokenizer, token_id)
        return raw

    def text(self, token_id: int) -> str:
        """The token as text; the part of a character as OpenAI writes it, `bytes:\\xe2\\x80`."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._form(token_id)
        return text

    def offsets(self, skip_special_tokens: bool) -> Offsets:
        """A counter of where the tokens of one text begin."""
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens) if self._tokenizer else None
        return Offsets(self, detokenizer)

    def _form(self, token_id: int) -> str:
        raw = self.raw(token_id)
        if raw is None:
            return f"token_id:{token_id}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Offsets:
    """Where each token of a text begins in it, in characters.

    A token that begins inside a character has the offset of that character, one inside a run of byte tokens
    (vocabularies of the SentencePiece kind) that of the run.
    """

    def __init__(self, texts: TokenTexts, detokenizer: Detokenizer | None) -> None:
        self._texts = texts
        self._detokenizer = detokenizer
        self._length = 0

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """The offsets of the text's next tokens."""
        offsets = []
        for token_id in token_ids:
            begin = self._length
            if self._detokenizer is not None:
                text = self._detokenizer.push(token_id)
                self._length += len(text)
                own = self._texts.text(token_id)
                if text.endswith(own):  # after what was held back until now
                    begin = self._length - len(own)
            offsets.append(begin)
        return offsets
