"""Which tokens end a sentence."""

from __future__ import annotations

from trimtab.models.tokenizer import Tokenizer

ENDS = tuple(".!?…。！？．｡")
CLOSING = "\"'”’»)]}」』）】"


def sentence_ends(tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids of the tokens whose text, spaces and closing quotes or brackets aside, ends in a full stop, a
    question or exclamation mark or an ellipsis (Western or CJK), and of those with a newline.

    None without a tokenizer.
    """
    if tokenizer is None or not tokenizer.available:
        return frozenset()
    ids = range(tokenizer.vocab_size)
    texts = tokenizer.backend.decode_batch([[i] for i in ids], skip_special_tokens=False)
    ordinary = (i for i in ids if i not in tokenizer.special_ids)
    return frozenset(
        i for i in ordinary if "\n" in texts[i] or texts[i].rstrip().rstrip(CLOSING).endswith(ENDS)
    )
