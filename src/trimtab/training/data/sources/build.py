"""Sources from the mappings of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, did_you_mean
from trimtab.models.tokenizer import Tokenizer
from trimtab.registry import build_dataclass
from trimtab.training.data.files import find_files
from trimtab.training.data.formats import ChatFormat, CompletionFormat, Format, LabelledFormat, TextFormat
from trimtab.training.data.mixture import Mixture, shares_of
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources import options
from trimtab.training.data.sources.base import Source
from trimtab.training.data.sources.documents import Documents
from trimtab.training.data.store_cache import Reading, cached_store, tokenizer_hash
from trimtab.training.data.text_bytes import text_bytes
from trimtab.training.data.token_store import TokenStore

VALIDATION_SEED = 1  # the same for all runs, so that their figures compare


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What the sources of a run share.

    Attributes:
        vocab_size: rows of the model's embedding.
        folder: what relative paths are below.
        cache: where token stores are kept; None = the user's cache folder.
        window: tokens of a segment where a source does not say.
        longest: tokens that the model takes; None = any number.
        progress: is told what takes long, line by line.
    """

    tokenizer: Tokenizer
    vocab_size: int
    folder: Path
    cache: Path | None = None
    seed: int = 0
    window: int = 2048
    longest: int | None = None
    progress: Callable[[str], None] | None = None


@dataclass(frozen=True, slots=True)
class Validation:
    """Held-out segments, and the bytes of the text whose tokens they predict, for bits per byte."""

    segments: list[Segment]
    text_bytes: int


def build_source(spec: Mapping[str, Any], context: SourceContext, held_out: bool = False) -> Source:
    """The source that `spec` (`kind` and the kind's settings) describes.

    `held_out` makes skills draw from the parameters that training never uses. Raises ConfigError for
    unknown or ill-typed settings, for data that cannot be used and for token ids the model has no row for.
    """
    kind = spec.get("kind")
    where = f"a source of kind {kind!r}"
    if not isinstance(kind, str) or kind not in options.KINDS:
        known = did_you_mean(str(kind), options.KINDS)
        raise ConfigError(
            f"a source has the unknown kind {kind!r}.{known}" if kind else f"a source has no 'kind'.{known}"
        )
    chosen = build_dataclass(options.KINDS[kind], {k: v for k, v in spec.items() if k != "kind"}, where=where)
    if isinstance(chosen, options.SkillsOptions):
        return _skills(chosen, context, held_out)
    if isinstance(chosen, options.DocumentsOptions):
        first = first_token(context.tokenizer, chosen.first)
        window = _length(chosen.window, "window", context)
        return Documents(_text_store(chosen, context), window, context.seed, first)
    form, reading = _whole_documents(chosen, context)
    return Documents(_store(chosen, form, reading, context), None, context.seed)


def build_mixture(specs: Sequence[Mapping[str, Any]], context: SourceContext) -> Mixture:
    """All sources of a recipe; each has besides its own settings a `weight` (default 1) and a `name`."""
    if not specs:
        raise ConfigError("the mixture is empty; give at least one source")
    for spec in specs:
        if not isinstance(spec, Mapping):
            raise ConfigError(f"a source of the mixture is {spec!r}; it must be a mapping with a 'kind'")
    weights = [spec.get("weight", 1.0) for spec in specs]
    shares_of(weights)  # before files are tokenized, which may take long
    sources, names = [], []
    for index, spec in enumerate(specs):
        own = {key: value for key, value in spec.items() if key != "weight"}
        names.append(str(own.pop("name", own.get("kind"))))
        sources.append(build_source(own, replace(context, seed=context.seed + index)))
    return Mixture(sources, weights, names)


def validation_segments(spec: Mapping[str, Any], context: SourceContext) -> Validation:
    """`windows` segments (default 64) of the source that `spec` describes, the same in every run.

    Those of files are spread evenly over them; exercises are drawn from the held-out parameters.
    """
    own = dict(spec)
    count = own.pop("windows", 64)
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"'windows' of the validation is {count!r}; it must be a whole number from 1 up")
    source = build_source(own, replace(context, seed=VALIDATION_SEED), held_out=True)
    if isinstance(source, Documents):
        count = min(count, len(source))
        segments = [source.numbered(i * len(source) // count) for i in range(count)]
    else:
        segments = [source.next() for _ in range(count)]
    if not any(s.trained[1:].any() or s.label is not None for s in segments):
        raise ConfigError("the validation holds no token to predict; give it longer texts or more 'windows'")
    return Validation(segments, text_bytes(context.tokenizer, segments))


def first_token(tokenizer: Tokenizer, wish: str) -> int | None:
    """The token that begins a text: for `auto` the one that the tokenizer itself puts there, if any."""
    if wish == "none":
        return None
    if wish == "bos" and tokenizer.bos_id is None:
        raise ConfigError("'first' is 'bos', but the tokenizer has no bos token; set 'first: none'")
    if wish == "bos" or tokenizer.encode("")[:1] == [tokenizer.bos_id]:
        return tokenizer.bos_id
    return None


def end_token(tokenizer: Tokenizer, wanted: bool) -> int | None:
    """The tokenizer's own end token, where it is wanted."""
    if not wanted:
        return None
    found = tokenizer.token_to_id(tokenizer.special_tokens.get("eos_token", ""))
    if found is None:
        raise ConfigError(
            "texts are to be closed by the end token, but the tokenizer has none; set 'end: false'"
        )
    return found


def _whole_documents(chosen: Any, context: SourceContext) -> tuple[Format, Reading]:
    tokenizer = context.tokenizer
    form: Format
    if isinstance(chosen, options.ChatOptions):
        form = ChatFormat(chosen.messages, chosen.train_on)
    elif isinstance(chosen, options.CompletionsOptions):
        first, last = first_token(tokenizer, chosen.first), end_token(tokenizer, chosen.end)
        form = CompletionFormat(chosen.prompt, chosen.completion, chosen.train_on, first, last)
    else:
        first = first_token(tokenizer, chosen.first)
        form = LabelledFormat(chosen.text, chosen.label, chosen.labels, first)
    return form, chosen.reading(_length(chosen.max_tokens, "max_tokens", context), chosen.too_long)


def _length(wish: int | None, name: str, context: SourceContext) -> int:
    """Tokens of a segment, at most: what a source wishes, else what holds for all."""
    length = context.window if wish is None else wish
    if context.longest is not None and length > context.longest:
        raise ConfigError(
            f"{name!r} of a source is {length} tokens and the model's context {context.longest}; lower it "
            "(or the recipe's 'window'), or raise 'model.context'"
        )
    return length


def _text_store(chosen: options.DocumentsOptions, context: SourceContext) -> TokenStore:
    if chosen.store is not None:
        return open_store(chosen.store, context)
    form = TextFormat(chosen.text, end_token(context.tokenizer, chosen.end))
    return _store(chosen, form, chosen.reading(), context)


def open_store(name: str, context: SourceContext) -> TokenStore:
    """A token store made before; ConfigError where it was made with another tokenizer."""
    store = TokenStore.open(context.folder / Path(name).expanduser())
    made_with = store.about.get("tokenizer")
    if made_with is not None and made_with != tokenizer_hash(context.tokenizer):
        raise ConfigError(
            f"the token store {store.folder} was made with another tokenizer; give 'paths' instead"
        )
    return _checked(store, context)


def _store(chosen: options.FileOptions, form: Format, reading: Reading, context: SourceContext) -> TokenStore:
    files = find_files(chosen.paths, context.folder, chosen.split, chosen.subset)
    return _checked(
        cached_store(files, form, context.tokenizer, reading, context.cache, context.progress), context
    )


def _checked(store: TokenStore, context: SourceContext) -> TokenStore:
    if store.largest >= context.vocab_size:
        raise ConfigError(
            f"the data holds the token id {store.largest}, but the model's vocab_size is "
            f"{context.vocab_size}; use the model's own tokenizer, or add embedding rows"
        )
    return store


def _skills(chosen: options.SkillsOptions, context: SourceContext, held_out: bool) -> Source:
    from trimtab.skills import World
    from trimtab.training.data.sources.skills import Skills, StoreTexts

    if chosen.store is not None:
        store = open_store(chosen.store, context)
    else:
        files = options.FileOptions(chosen.texts, encoding=chosen.encoding)
        form = TextFormat(
            chosen.text, end_token(context.tokenizer, "eos_token" in context.tokenizer.special_tokens)
        )
        store = _store(files, form, files.reading(), context)
    settings = dict(chosen.world) | {
        "texts": StoreTexts(store, context.tokenizer),
        "split": "held-out" if held_out else "train",
    }
    world = build_dataclass(World, settings, where="'world' of a source of skills")
    return Skills(
        context.tokenizer,
        world,
        chosen.skills,
        context.seed,
        train_on=chosen.train_on,
        max_tokens=_length(chosen.max_tokens, "max_tokens", context),
    )
