"""Small tokenizers of the kinds the model families use, written as the families' checkpoints are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps all day long",
    "Once upon a time there was a naïve café, élan and Ünïcödé; 12345 numbers 67890.",
    "def solve(x):\n    return x - 1\n\n\tindented  twice   thrice",
    "你好，世界。こんにちは 🎉🎊 Привет мир",
    "It's they're we'll I'd don't — “quoted” text…",
] * 3

TEXTS = [
    "",
    " ",
    "Once upon a time",
    " leading and trailing ",
    "two  spaces   three\n\nlines\r\n\ttabs",
    "naïve café Ünïcödé 你好，世界 🎉👩‍👩‍👧 ไทย",
    "don't we'll I'D 3.14159 and 1234567",
    "cafe\u0301 decomposed",
    "▁ literal ▁▁underscore",
    "text with <s>special</s> tokens<|end|> inside <|extra|> it",
    "\x00\x01 control",
]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(split: str, specials: list[str], *, nfc: bool = False, bos: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.add_tokens([AddedToken("<|extra|>", special=False, normalized=False), "né w", "ｗide"])
    if bos is not None:
        framing = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), framing])
    else:
        tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return tokenizer


def sentence_piece(style: str) -> Tokenizer:
    """Byte-fallback BPE. `style`: "normalizer" (older files) or a Metaspace prepend scheme."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, limit_alphabet=60)
    trained.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(trained.to_str())["model"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + sorted(
        learnt["vocab"], key=learnt["vocab"].get
    ):
        vocab.setdefault(token, len(vocab))
    vocab.setdefault("▁", len(vocab))
    vocab.setdefault("▁▁", len(vocab))
    merges = [tuple(m) for m in learnt["merges"]] + [("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = [] if style == "never" else [decoders.Strip(content=" ", left=1)]
    if style == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(
        [AddedToken(s, special=True, normalized=False) for s in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def with_decoder(decoder: Any) -> Tokenizer:
    """A byte-fallback vocabulary with some other decoder, for the general way of streaming."""
    tokenizer = sentence_piece("first")
    tokenizer.decoder = decoder
    return tokenizer


KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    # name: (tokenizer, model_type, tokenizer_config)
    "llama3": (
        lambda: byte_level(LLAMA3_SPLIT, ["<s>", "</s>", "<|end|>"], bos="<s>"),
        "llama",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|end|>"},
    ),
    "qwen2": (
        lambda: byte_level(QWEN_SPLIT, ["</s>", "<|end|>"], nfc=True),
        "qwen2",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": "<|end|>",
            "pad_token": "</s>",
            "unk_token": None,
            "add_bos_token": False,
            "additional_special_tokens": ["<|end|>", "<s>"],
        },
    ),
    "llama2": (
        lambda: sentence_piece("normalizer"),
        "llama",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": {
                "__type": "AddedToken",
                "content": "<s>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
            },
            "eos_token": {
                "__type": "AddedToken",
                "content": "</s>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
            },
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
        },
    ),
    "llama2-legacy": (
        lambda: sentence_piece("normalizer"),
        "llama",
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": True,
        },
    ),
    "llama2-no-prefix": (
        lambda: sentence_piece("never"),
        "llama",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_prefix_space": False,
        },
    ),
    "mistral": (
        lambda: sentence_piece("first"),
        "mistral",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "legacy": False,
        },
    ),
    "plain-metaspace": (
        lambda: sentence_piece("always"),
        "llama",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "extra_special_tokens": ["<|end|>"],
        },
    ),
}


def write(kind: str, folder: Path) -> Path:
    """A checkpoint folder with the tokenizer `kind`, no weights."""
    make, model_type, config = KINDS[kind]
    tokenizer = make()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 1000}))
    return folder
