"""Text to token ids and back, as the checkpoint's own files say.

A `Tokenizer` is read from a model folder: `tokenizer.json` (the `tokenizers` library does the work),
`tokenizer_config.json` and `special_tokens_map.json` (named special tokens, whether a beginning or end
token is added, chat templates), and `config.json` and `generation_config.json` (tokens that end a text).
The ids equal those of `transformers.AutoTokenizer` on the families trimtab loads.

A folder without `tokenizer.json` still gives a `Tokenizer`: it knows the end tokens, its `available` is
False, and only asking it for text is an error. So a bare model can be run on token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import CheckpointError, RequestError
from trimtab.models.tokenizer_files import read_tokenizer_files

if TYPE_CHECKING:
    import tokenizers

    from trimtab.models.chat_template import ChatTemplate


class Tokenizer:
    """One checkpoint's tokenizer. Make it with `Tokenizer.from_folder(path)`.

    Attributes:
        eos_ids: every token id that ends a text: the union of `eos_token_id` in `config.json` and
            `generation_config.json` and of the tokenizer's own end token.
        bos_id, pad_id, unk_id: ids or None.
        special_ids: ids that `decode(..., skip_special_tokens=True)` leaves out.
        special_tokens: named special tokens as text, e.g. `{"bos_token": "<s>"}`.
        vocab_size: highest token id the tokenizer can produce, plus one (0 where it is not available).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | None,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        path: Path | None = None,
    ) -> None:
        self.path = path
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._backend = backend
        self._chat: ChatTemplate | None = None
        self.vocab_size = 0
        self.special_ids: frozenset[int] = frozenset()
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            added = backend.get_added_tokens_decoder()
            self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = self._named_id("bos_token")
        self.pad_id = self._named_id("pad_token")
        self.unk_id = self._named_id("unk_token")
        own_eos = self._named_id("eos_token")
        self.eos_ids = frozenset(eos_ids) | ({own_eos} if own_eos is not None else set())

    @classmethod
    def from_folder(cls, path: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer of the model folder `path`.

        `vocab_size` is the model's number of embedding rows; it defaults to the one in `config.json`, if
        there is such a file. Raises CheckpointError for unreadable files and for a tokenizer that can
        produce ids the model has no row for.
        """
        files = read_tokenizer_files(Path(path))
        tokenizer = cls(
            files.backend,
            special_tokens=files.special_tokens,
            eos_ids=files.eos_ids,
            chat_templates=files.chat_templates,
            path=Path(path),
        )
        rows = vocab_size if vocab_size is not None else files.vocab_size
        if rows is not None:
            tokenizer.check_vocab_size(rows)
        return tokenizer

    @property
    def available(self) -> bool:
        """Whether text can be turned into ids and back."""
        return self._backend is not None

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer`; a RequestError where the checkpoint has none."""
        if self._backend is None:
            where = f"{self.path} has" if self.path is not None else "this model has"
            raise RequestError(
                f"{where} no tokenizer.json, so text cannot be read or written; pass prompts as lists of "
                "token ids, or put the family's tokenizer.json into the folder (from a tokenizer.model, "
                "transformers' AutoTokenizer writes one with save_pretrained)"
            )
        return self._backend

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raise CheckpointError if some token id has no row in a model with `vocab_size` embeddings."""
        if self.vocab_size > vocab_size:
            worst = self.vocab_size - 1
            token = self.id_to_token(worst)
            where = f"the tokenizer in {self.path}" if self.path is not None else "the tokenizer"
            raise CheckpointError(
                f"{where} does not match the model: token {token!r} has id {worst}, but the model's "
                f"vocab_size is {vocab_size}; use the tokenizer it was trained with, or add embedding rows"
            )
        unknown = sorted(i for i in self.eos_ids if not 0 <= i < vocab_size)
        if unknown:
            raise CheckpointError(
                f"eos_token_id {unknown[0]} is outside the model's vocabulary of {vocab_size} tokens; mend "
                f"eos_token_id in config.json or generation_config.json"
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` frames it as the checkpoint asks (a first bos, say)."""
        if not isinstance(text, str):
            raise RequestError(f"a text to tokenize is a {type(text).__name__}; it must be a str")
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # what the library raises for lone surrogates
            raise RequestError(
                "the text is not valid Unicode (it holds half a surrogate pair) and cannot be tokenized"
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids outside the vocabulary stand for no text; half characters become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry as written in the file (`Ġthe`, `▁the`, `<0x0A>`), or None."""
        return self.backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The conversation as one prompt string; encode it with `add_special_tokens=False`.

        Args:
            messages: dicts with `role` and `content`, oldest first.
            add_generation_prompt: end with the words that open the assistant's answer.
            tools: JSON schemas of functions the model may call.
            documents: texts for templates that take them, dicts with `title` and `text`.
            chat_template: a template, or the name of one of the checkpoint's; default: the checkpoint's.
            continue_final_message: leave the last message open, to be continued; replaces
                `add_generation_prompt`.
            kwargs: further variables of the template, e.g. `enable_thinking=False`.

        Raises RequestError where there is no template, or the template refuses or fails.
        """
        if self._chat is None:
            from trimtab.models.chat_template import ChatTemplate

            self._chat = ChatTemplate(self.chat_templates, self.special_tokens)
        return self._chat.render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            template=chat_template,
            variables=kwargs,
        )

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None or self._backend is None:
            return None
        return self._backend.token_to_id(token)

    def __repr__(self) -> str:
        if self._backend is None:
            return f"Tokenizer(no tokenizer.json, eos_ids={sorted(self.eos_ids)})"
        return f"Tokenizer(vocab_size={self.vocab_size}, eos_ids={sorted(self.eos_ids)}, path={self.path})"

    def __getstate__(self) -> dict[str, Any]:
        # Compiled templates do not pickle; they are made again on first use.
        return self.__dict__ | {"_chat": None}


def decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]] | None:
    """The steps that turn tokens into text, as in `tokenizer.json`; None where the file has no decoder."""
    decoder = tokenizer.backend.decoder
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]
