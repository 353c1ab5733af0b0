"""Reads the tokenizer's files of a model folder into what `Tokenizer` needs.

What frames a prompt (a first bos, say) is `tokenizer.json`'s post-processor alone: `add_bos_token` in
`tokenizer_config.json` speaks to tokenizers without that file, and `transformers` passes over it likewise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    backend: tokenizers.Tokenizer | None
    special_tokens: dict[str, str] = field(default_factory=dict)
    eos_ids: frozenset[int] = frozenset()
    chat_templates: dict[str, str] = field(default_factory=dict)
    vocab_size: int | None = None


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Everything in `folder` that says how text becomes ids; CheckpointError names the file at fault."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds the model's files")
    model_config = _read_json(folder / "config.json")
    eos_ids = frozenset(
        _ids(model_config, folder / "config.json")
        + _ids(_read_json(folder / "generation_config.json"), folder / "generation_config.json")
    )
    config = _with_special_tokens_map(folder, _read_json(folder / "tokenizer_config.json"))
    named = {name: _content(config.get(name)) for name in NAMED_SPECIAL_TOKENS}
    special = {name: text for name, text in named.items() if text is not None}
    vocab_size = model_config.get("vocab_size")
    return TokenizerFiles(
        backend=_read_backend(folder, config, special),
        special_tokens=special,
        eos_ids=eos_ids,
        chat_templates=_read_chat_templates(folder, config),
        vocab_size=vocab_size if isinstance(vocab_size, int) else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy the file again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(data).__name__}")
    return data


def _ids(config: Mapping[str, Any], path: Path) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool):
            raise CheckpointError(f"eos_token_id in {path} is {value!r}; it must be one or several token ids")
    return ids


def _with_special_tokens_map(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    # The map is the older place; files that list `added_tokens_decoder` no longer need it.
    if "added_tokens_decoder" in config:
        return config
    return config | _read_json(folder / "special_tokens_map.json")


def _content(token: Any) -> str | None:
    """The text of a token written as a string or as `{"content": ...}`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_backend(
    folder: Path, config: Mapping[str, Any], special: Mapping[str, str]
) -> tokenizers.Tokenizer | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a file of the `tokenizers` library: {error}") from None
    if config.get("clean_up_tokenization_spaces") and type(backend.model).__name__ != "BPE":
        raise CheckpointError(
            f"clean_up_tokenization_spaces is true in {folder / 'tokenizer_config.json'}, which changes the "
            f"text of a {type(backend.model).__name__} tokenizer and is not implemented; set it to false"
        )
    _use_llama_class_rules(backend, config)
    _add_missing_tokens(backend, config, special)
    return backend


def _use_llama_class_rules(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Checkpoints that name the class LlamaTokenizer get that class's spaces, whatever the file says.

    `transformers` does so, and the setting `legacy` decides: legacy puts a leading space before the text
    and after every special token, the other way only before the text.
    """
    declared = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if declared != "LlamaTokenizer" or type(backend.model).__name__ != "BPE" or _mentions_byte_level(backend):
        return
    from tokenizers import decoders, pre_tokenizers

    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if config.get("legacy", False) else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))


def _mentions_byte_level(backend: tokenizers.Tokenizer) -> bool:
    parts = (backend.pre_tokenizer, backend.decoder)
    return any(part is not None and b'"ByteLevel"' in part.__getstate__() for part in parts)


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Add the tokens that only the config files know, and mark the special ones as special."""
    from tokenizers import AddedToken

    def token_of(entry: Any, is_special: bool) -> AddedToken:
        if isinstance(entry, str):
            return AddedToken(entry, special=is_special, normalized=False)
        known = {k: bool(entry[k]) for k in ("lstrip", "rstrip", "normalized", "single_word") if k in entry}
        return AddedToken(entry["content"], special=is_special or bool(entry.get("special")), **known)

    in_file = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed: dict[str, AddedToken] = {}
    entries = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        token = token_of(entry, False)
        listed[token.content] = token
        if token.content not in in_file:
            backend.add_tokens([token])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    wanted = [config[name] for name in special] + extra
    for entry in wanted:
        text = _content(entry)
        if text is None:
            continue
        known = in_file.get(text) or listed.get(text)
        if known is None:
            backend.add_special_tokens([token_of(entry, True)])
        elif not known.special:
            known.special = True
            backend.add_special_tokens([known])


def _read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; a single one is called `default`."""
    stated = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(stated, str):
        templates["default"] = stated
    elif isinstance(stated, list):
        for entry in stated:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("template"), str):
                raise CheckpointError(
                    f"chat_template in {folder / 'tokenizer_config.json'} is a list whose entries must be "
                    '{"name": ..., "template": ...}'
                )
            templates[str(entry.get("name"))] = entry["template"]
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: path for name, path in files.items() if path.is_file()}
    if found:
        # Files replace the config's templates altogether, as in transformers.
        templates = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    return templates
