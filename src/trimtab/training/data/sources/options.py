"""The settings of each kind of source, as a recipe's `mixture` names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trimtab.errors import ConfigError
from trimtab.training.data.formats import TooLong
from trimtab.training.data.store_cache import Reading


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Where records come from; shared by the kinds that read files.

    paths: files, globs and folders, relative to the recipe's folder.
    split, subset: which part of a Hugging Face dataset folder; by default `train` of its only subset.
    encoding: of the files' text.
    on_error: `stop` at the first record that cannot be used, or `skip` and count such records.
    """

    paths: tuple[str, ...] = ()
    split: str | None = None
    subset: str | None = None
    encoding: str = "utf-8"
    on_error: Literal["stop", "skip"] = "stop"

    def reading(self, max_tokens: int | None = None, too_long: TooLong = "drop") -> Reading:
        return Reading(self.encoding, self.on_error, max_tokens, too_long)


@dataclass(frozen=True, slots=True)
class DocumentsOptions(FileOptions):
    """Running text, cut into windows.

    text: the column with the text.
    window: tokens of a window, `first` included; default: the recipe's.
    first: `bos` begins every window with that token, `auto` does where the tokenizer does so itself.
    end: whether the tokenizer's end token closes a document.
    store: a token-store folder instead of `paths`.
    """

    text: str = "text"
    window: int | None = None
    first: Literal["auto", "bos", "none"] = "auto"
    end: bool = True
    store: str | None = None

    def __post_init__(self) -> None:
        if self.store is None or not self.paths:
            return
        raise ConfigError("a source of documents has both 'paths' and 'store'; leave one of them out")


@dataclass(frozen=True, slots=True)
class ChatOptions(FileOptions):
    """Conversations through the chat template.

    messages: the column with the list of messages; default: told by the columns there are.
    train_on: the words of all `answers`, of the `last` one, or `all` words.
    max_tokens: of a conversation; default: the recipe's window. `too_long`: `drop` a longer one, or cut it.
    """

    messages: str | None = None
    train_on: Literal["answers", "last", "all"] = "answers"
    max_tokens: int | None = None
    too_long: TooLong = "drop"


@dataclass(frozen=True, slots=True)
class CompletionsOptions(FileOptions):
    """Prompts with completions, without a chat template.

    prompt, completion: their columns.
    train_on: the completion only (`answers`), or `all`.
    first, end: as for documents. max_tokens, too_long: as for chats.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    train_on: Literal["answers", "all"] = "answers"
    first: Literal["auto", "bos", "none"] = "auto"
    end: bool = True
    max_tokens: int | None = None
    too_long: TooLong = "drop"


@dataclass(frozen=True, slots=True)
class LabelledOptions(FileOptions):
    """Texts with classes.

    text, label: their columns.
    labels: the names of the classes in order, where the column holds names.
    first: as for documents. max_tokens, too_long: as for chats.
    """

    text: str = "text"
    label: str = "label"
    labels: tuple[str, ...] = ()
    first: Literal["auto", "bos", "none"] = "auto"
    max_tokens: int | None = None
    too_long: TooLong = "cut_right"


@dataclass(frozen=True, slots=True)
class SkillsOptions:
    """Generated exercises as conversations; see docs/skills.md.

    skills: weight of each skill; default: all of them equally.
    texts: files with prose for the exercises, as `paths` elsewhere; or `store`, a token-store folder.
    text, encoding: of those files.
    world: settings of `trimtab.skills.World`.
    train_on: `answers`, `all` words, or `auto`: all words of long exercises, whose prose is text like any
        other, and the answers of short ones.
    max_tokens: longer conversations are left out; default: the recipe's window.
    """

    skills: Mapping[str, float] | None = None
    texts: tuple[str, ...] = ()
    store: str | None = None
    text: str = "text"
    encoding: str = "utf-8"
    world: Mapping[str, Any] = field(default_factory=dict)
    train_on: Literal["auto", "answers", "all"] = "auto"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.store is None) == (not self.texts):
            raise ConfigError("a source of skills needs prose: give either 'texts' (files) or 'store'")
        if "split" in self.world or "texts" in self.world:
            raise ConfigError("'world' of a source of skills sets 'split' or 'texts'; leave them out")


KINDS: dict[str, type] = {
    "documents": DocumentsOptions,
    "chat": ChatOptions,
    "completions": CompletionsOptions,
    "labelled": LabelledOptions,
    "skills": SkillsOptions,
}
