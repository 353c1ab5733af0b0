"""Log-probabilities in the three forms that clients know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.engine.request import TokenLogprob
    from trimtab.serving.token_texts import TokenTexts

LEAST = -9999.0  # stands for minus infinity, which JSON does not know


def legacy(
    texts: TokenTexts, logprobs: Sequence[TokenLogprob | None], ids: Sequence[int], offsets: Sequence[int]
) -> dict[str, Any]:
    """`logprobs` of `/v1/completions`; the first token of a text has none.

    As with OpenAI `top_logprobs` holds the chosen token too, so it may have one entry more than asked for.
    """
    tops: list[dict[str, float] | None] = []
    for entry in logprobs:
        if entry is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        # Several ids may have one text: the likeliest of them speaks for it.
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(texts.text(token), _bounded(logprob))
        tops.append(top)
    return {
        "tokens": [texts.text(token) for token in ids],
        "token_logprobs": [None if entry is None else _bounded(entry.logprob) for entry in logprobs],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def chat(texts: TokenTexts, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of `/v1/chat/completions`."""
    content = [
        _token(texts, entry.token_id, entry.logprob)
        | {"top_logprobs": [_token(texts, token, logprob) for token, logprob in entry.top]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def prompt(texts: TokenTexts, logprobs: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token `{id: {logprob, rank, decoded_token}}`, the first null.

    The rank of a token that is not among the likeliest ones asked for is null.
    """
    found: list[dict[str, Any] | None] = []
    for entry in logprobs:
        if entry is None:
            found.append(None)
            continue
        ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)]
        if all(token != entry.token_id for token, _ in entry.top):
            ranked.append((entry.token_id, entry.logprob, None))  # type: ignore[arg-type]
        found.append(
            {
                str(token): {
                    "logprob": _bounded(logprob),
                    "rank": rank,
                    "decoded_token": texts.text(token),
                }
                for token, logprob, rank in ranked
            }
        )
    return found


def _token(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    raw = texts.raw(token_id)
    return {
        "token": texts.text(token_id),
        "logprob": _bounded(logprob),
        "bytes": None if raw is None else list(raw),
    }


def _bounded(logprob: float) -> float:
    return logprob if logprob >= LEAST else LEAST
