"""A model with another tokenizer, for a language that its own one cuts into small pieces.

To go on with the old tokenizer (LLaMAntino, arXiv 2312.09993) nothing need be done. ChocoLlama (arXiv
2412.07633) gains from a new one when the new embeddings begin near what they mean.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from trimtab.errors import ConfigError
from trimtab.models.config import config_from_dict
from trimtab.models.detokenizer import token_bytes
from trimtab.models.tokenizer import Tokenizer
from trimtab.models.transformer import Model

How = Literal["fvt", "mean", "random"]
_HOWS = ("fvt", "mean", "random")


def replace_tokenizer(model: Model, tokenizer: Tokenizer, how: How = "fvt", seed: int = 0) -> Model:
    """`model` with the vocabulary of `tokenizer`; all weights but embedding and head are shared with it.

    Special tokens keep their rows: by role (bos, eos, pad, unk), or by name. The other rows, of the
    embedding and of an untied head alike, begin by `how`:

    - `fvt`: a token that the old vocabulary has too keeps its row; any other gets the mean of the rows of
      the old pieces of its text (fast vocabulary transfer, Gee et al., arXiv 2402.09977);
    - `mean`: the mean of all old rows;
    - `random`: normal, with the mean and deviation of the old rows, drawn by `seed`.

    Raises ConfigError where one of the tokenizers is missing or `how` is none of these.
    """
    old = model.tokenizer
    if how not in _HOWS:
        raise ConfigError(f"'how' is {how!r}; it must be one of {', '.join(_HOWS)}")
    if old is None or not old.available or not tokenizer.available:
        raise ConfigError("replacing a tokenizer needs the model's own one and the new one; one has no files")
    pieces = _pieces(old, tokenizer, how)
    state = dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = _rows(state[name], pieces, how, seed)
    with torch.device("meta"):
        changed = Model(config_from_dict(_config(model, old, tokenizer)))
    changed.load_state_dict(state, assign=True)
    changed.tokenizer, changed.path = tokenizer, tokenizer.path
    return changed


def _config(model: Model, old: Tokenizer, new: Tokenizer) -> dict[str, Any]:
    raw = dict(model.config.raw) | {"vocab_size": new.vocab_size}
    ends = {_special(old, new, i) for i in model.config.eos_token_ids} | new.eos_ids
    known = sorted(i for i in ends if i is not None)
    ids = {"bos_token_id": new.bos_id, "pad_token_id": new.pad_id, "eos_token_id": known or None}
    if len(known) == 1:
        ids["eos_token_id"] = known[0]
    for name, value in ids.items():
        raw.pop(name, None)
        if value is not None:
            raw[name] = value
    return raw


def _special(source: Tokenizer, target: Tokenizer, token_id: int) -> int | None:
    """The token of `target` with the role, or else the name, of a special token of `source`."""
    name = source.id_to_token(token_id)
    for role, text in source.special_tokens.items():
        if text == name and role in target.special_tokens:
            return target.token_to_id(target.special_tokens[role])
    return target.token_to_id(name) if name is not None else None


def _pieces(old: Tokenizer, new: Tokenizer, how: How) -> list[list[int]]:
    """For each new token the old tokens whose rows it begins from; none where there are none."""
    by_bytes = {}
    if how == "fvt":
        ids = (i for i in range(old.vocab_size) if i not in old.special_ids)
        by_bytes = {token_bytes(old, i): i for i in ids}
    pieces = []
    for token_id in range(new.vocab_size):
        if token_id in new.special_ids:
            kept = _special(new, old, token_id)
            pieces.append([] if kept is None else [kept])
        elif how == "fvt":
            pieces.append(_of_text(old, token_bytes(new, token_id), by_bytes))
        else:
            pieces.append([])
    return pieces


def _of_text(old: Tokenizer, text: bytes, by_bytes: dict[bytes, int]) -> list[int]:
    if text in by_bytes:
        return [by_bytes[text]]
    try:
        words = text.decode()
    except UnicodeDecodeError:  # a part of a character
        return [by_bytes[byte] for byte in (text[i : i + 1] for i in range(len(text))) if byte in by_bytes]
    # Some tokenizers begin every text with a space of their own; then the token's space is left to them.
    for attempt in (words, words.removeprefix(" ")):
        found = old.encode(attempt, add_special_tokens=False)
        if b"".join(token_bytes(old, i) for i in found) == text:
            return found
    return old.encode(words, add_special_tokens=False)


def _rows(old: torch.Tensor, pieces: list[list[int]], how: How, seed: int) -> torch.Tensor:
    """The new matrix `[new tokens, width]` in the dtype of `old`."""
    values = old.detach().float()
    mean = values.mean(0)
    if how == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(pieces), values.shape[1], generator=generator)
        rows = mean + noise * (values - mean).std()
    else:
        rows = mean.repeat(len(pieces), 1)
    for token_id, found in enumerate(pieces):
        if found:
            rows[token_id] = values[found].mean(0)
    return rows.to(old.dtype)
