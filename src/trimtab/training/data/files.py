"""Which files a recipe's `paths` mean: files, globs and folders, Hugging Face dataset folders included."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trimtab.errors import ConfigError, did_you_mean

T = TypeVar("T")

SUFFIXES = (
    ".jsonl",
    ".jsonl.zst",
    ".jsonl.gz",
    ".json",
    ".parquet",
    ".arrow",
    ".txt",
    ".txt.zst",
    ".txt.gz",
    ".md",
)
_NOT_DATA = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json", "README.md")
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_WORD = re.compile(r"[A-Za-z]+")


def find_files(
    paths: Sequence[str], folder: Path, split: str | None = None, subset: str | None = None
) -> list[Path]:
    """The data files that `paths` name, each once.

    A path is a file, a glob, or a folder; relative ones are below `folder`. Of a folder whose files or
    sub-folders are named after splits, or whose README.md says which files make up a split (Hugging Face's
    layout), those of `split` are taken, by default `train`. `subset` picks one of several configurations
    of such a README. Raises ConfigError where nothing is found.
    """
    found: dict[Path, None] = {}
    for name in paths:
        place = Path(name).expanduser()
        place = place if place.is_absolute() else folder / place
        if place.is_dir():
            found |= dict.fromkeys(_files_of_folder(place, split, subset))
            continue
        if split is not None or subset is not None:
            raise ConfigError(f"'split' and 'subset' choose within a dataset folder, and {place} is none")
        found |= dict.fromkeys(_files_of_name(place))
    if not found:
        raise ConfigError("'paths' is empty; name at least one file, glob or folder of training data")
    for path in found:
        if suffix_of(path) is None:
            raise ConfigError(f"{path} is of no known kind; data files end with {', '.join(SUFFIXES)}")
    return list(found)


def suffix_of(path: Path) -> str | None:
    """The one of `SUFFIXES` that `path` ends with, or None."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), None)


def _files_of_name(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if glob.has_magic(str(place)):
        matches = [Path(p) for p in sorted(glob.glob(str(place), recursive=True))]
        files = [p for p in matches if p.is_file()]
        if not files:
            raise ConfigError(f"no file matches {place}")
        return files
    beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    raise ConfigError(f"there is no file or folder {place}.{did_you_mean(place.name, beside)}")


def _files_of_folder(folder: Path, split: str | None, subset: str | None) -> list[Path]:
    declared = _declared(folder, subset)
    if declared is not None:
        # Files of other splits need not be there.
        patterns = _of_split(declared, split, folder)
        return [path for pattern in patterns for path in _files_of_name(folder / pattern)]
    if subset is not None:
        raise ConfigError(f"'subset' is {subset!r}, but {folder} has no README.md that names subsets")
    files = sorted(p for p in folder.rglob("*") if _is_data(p.relative_to(folder)) and p.is_file())
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if split is None and set(by_split) == {""}:
        return files
    by_split.pop("", None)
    return _of_split(by_split, split, folder)


def _of_split(by_split: dict[str, list[T]], split: str | None, folder: Path) -> list[T]:
    if not by_split:
        raise ConfigError(
            f"there is no data file in the folder {folder}; they end with {', '.join(SUFFIXES)}"
        )
    wanted = _SPLITS.get(split or "train", split or "train")
    if wanted not in by_split:
        raise ConfigError(
            f"the folder {folder} has no split {wanted!r}; set 'split' to {' or '.join(sorted(by_split))}"
        )
    return by_split[wanted]


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name not in _NOT_DATA and suffix_of(path) is not None


def _split_of(path: Path) -> str:
    """The split that a file's name or else a folder above it is called after, or ""."""
    for part in (path.name, *reversed(path.parent.parts)):
        for word in _WORD.findall(part):
            if word.lower() in _SPLITS:
                return _SPLITS[word.lower()]
    return ""


def _declared(folder: Path, subset: str | None) -> dict[str, list[str]] | None:
    """File names and globs of each split as the dataset card's `configs` say; None where they say nothing."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.S)
    try:
        about = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        raise ConfigError(f"the head of {card} is no YAML: {' '.join(str(error).split())}") from None
    configs = about.get("configs") if isinstance(about, dict) else None
    if not configs:
        return None
    by_name = {str(c.get("config_name", "default")): c for c in configs if isinstance(c, dict)}
    default = next((n for n, c in by_name.items() if c.get("default") or n == "default"), None)
    name = subset or (next(iter(by_name)) if len(by_name) == 1 else default)
    if name is None:
        raise ConfigError(f"{folder} has several subsets; set 'subset' to {' or '.join(sorted(by_name))}")
    if name not in by_name:
        raise ConfigError(f"{folder} has no subset {name!r}.{did_you_mean(name, by_name)}")
    try:
        return _patterns(by_name[name].get("data_files")) or None
    except (KeyError, TypeError):
        raise ConfigError(
            f"the 'data_files' of subset {name!r} in {card} name no 'split' and 'path'"
        ) from None


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """`data_files` of a dataset card: a pattern, several, or a list of `{split, path}`."""
    entries = data_files if isinstance(data_files, list) else [data_files] if data_files else []
    by_split: dict[str, list[str]] = {}
    for entry in entries:
        split, path = ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
        name = _SPLITS.get(str(split), str(split))
        by_split.setdefault(name, []).extend([path] if isinstance(path, str) else path)
    return by_split
