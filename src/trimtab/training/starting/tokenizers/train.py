"""Training a tokenizer: byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import ConfigError
from trimtab.models.save import replace_folder
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.files import find_files
from trimtab.training.data.readers import iterate_records
from trimtab.training.data.records import BadRecord, take_text

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_BYTES = 256


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What a new tokenizer is to be.

    vocab_size: tokens, the special ones and the 256 bytes included. Little text may not give so many.
    bos, eos, pad: special tokens; their ids are the first ones, in the order pad, bos, eos, others.
    others: further special tokens, those of the chat template.
    chat_template: Jinja source; None = no template.
    split_digits: whether every digit is a token of its own, which arithmetic is easier with.
    begin: whether `bos` is put before every text.
    """

    vocab_size: int
    bos: str = "<|bos|>"
    eos: str = "<|eos|>"
    pad: str = "<|pad|>"
    others: tuple[str, ...] = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    chat_template: str | None = CHAT_TEMPLATE
    split_digits: bool = True
    begin: bool = True

    @property
    def specials(self) -> list[str]:
        return [self.pad, self.bos, self.eos, *self.others]

    def __post_init__(self) -> None:
        repeated = {s for s in self.specials if self.specials.count(s) > 1}
        if repeated or "" in self.specials:
            raise ConfigError(
                f"the special tokens {self.specials} must be different texts, none of them empty"
            )
        least = _BYTES + len(self.specials)
        if self.vocab_size < least:
            raise ConfigError(
                f"'vocab_size' is {self.vocab_size}; the bytes and special tokens alone are {least} tokens"
            )


def train_tokenizer(
    paths: Sequence[str],
    folder: str | Path,
    settings: TokenizerSettings,
    *,
    column: str = "text",
    encoding: str = "utf-8",
    root: Path = Path(),
) -> Tokenizer:
    """Train a tokenizer on files (see `data.files.find_files`) and write it to the new folder `folder`.

    The folder holds `tokenizer.json` and `tokenizer_config.json`, which transformers reads too. Raises
    ConfigError for files that cannot be used and OutputError where the folder is not empty or cannot be
    written; then nothing is left behind.
    """
    files = find_files(paths, root)
    backend = _train(_texts(files, column, encoding), settings)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": settings.bos,
        "eos_token": settings.eos,
        "pad_token": settings.pad,
        "additional_special_tokens": list(settings.others),
        "clean_up_tokenization_spaces": False,
    }
    if settings.chat_template is not None:
        config["chat_template"] = settings.chat_template

    def fill(scratch: Path) -> None:
        (scratch / "tokenizer.json").write_text(backend, encoding="utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (scratch / "tokenizer_config.json").write_text(text, encoding="utf-8")

    made = replace_folder(Path(folder).expanduser(), fill, what="the tokenizer", overwrite=False)
    return Tokenizer.from_folder(made)


def _train(texts: Iterator[str], settings: TokenizerSettings) -> str:
    """The tokenizer as `tokenizer.json` has it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if settings.split_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])  # type: ignore[assignment]
    else:
        backend.pre_tokenizer = byte_level  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=settings.specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    if settings.begin:
        bos = (settings.bos, backend.token_to_id(settings.bos))
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{settings.bos} $A", pair=f"{settings.bos} $A $B", special_tokens=[bos]
        )
    return backend.to_str()


def _texts(files: Sequence[Path], column: str, encoding: str) -> Iterator[str]:
    for path in files:
        for record in iterate_records(path, (column,), encoding):
            try:
                yield take_text(record.values, column, "column")
            except BadRecord as error:
                raise ConfigError(f"{record.where}: {error}") from None
