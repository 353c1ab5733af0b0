"""Tokenized documents in memory-mapped files, made once for a set of files and a tokenizer.

`tokens.bin` holds the tokens of all documents end to end, `ends.npy` where each ends, `trained.bin` which
tokens are predicted (only where not all are), `labels.npy` the classes (only where there are any). The
folder is written beside its place, brought to the disk and renamed, so a store is whole or not there.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trimtab.errors import ConfigError
from trimtab.models.save import replace_folder
from trimtab.training.data.segments import Segment
from trimtab.training.keeping.folder import to_disk

_ONES = np.ones(1 << 20, dtype=bool)


@dataclass(frozen=True)
class TokenStore:
    """Documents as tokens.

    Attributes:
        tokens: uint16 or uint32, memory-mapped.
        ends: int64 `[documents]`, the index after each document's last token.
        trained: bool, memory-mapped, or None where every token is predicted.
        labels: int64 `[documents]`, or None.
        about: what `store.json` says.
    """

    folder: Path
    tokens: np.ndarray
    ends: np.ndarray
    trained: np.ndarray | None
    labels: np.ndarray | None
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """The store in `folder`; ConfigError where there is none, or a damaged one."""
        try:
            about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            tokens = np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r")
            ends = np.load(folder / "ends.npy", mmap_mode="r")
            mask, labels = folder / "trained.bin", folder / "labels.npy"
            trained = np.memmap(mask, dtype=bool, mode="r") if mask.exists() else None
            classes = np.load(labels) if labels.exists() else None
        except FileNotFoundError as error:
            raise ConfigError(f"{folder} is no token store: it has no {Path(error.filename).name}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"the token store {folder} is damaged ({error}); remove the folder") from None
        rows = len(tokens) if trained is None else len(trained)
        if not len(ends) or not len(tokens) == ends[-1] == rows:
            raise ConfigError(f"the token store {folder} is damaged: its files disagree; remove the folder")
        return cls(folder, tokens, ends, trained, classes, about)

    @classmethod
    def write(
        cls,
        folder: Path,
        documents: Iterable[Segment],
        vocab_size: int,
        about: dict[str, Any],
        counts: Callable[[], Mapping[str, Any]] = dict,
    ) -> TokenStore:
        """Write `documents` to a new store; `about` is kept in `store.json` for readers.

        What `counts` gives after the last document is kept too. Empty documents are left out. Raises
        ConfigError when no document is left and OutputError when writing fails; then nothing is left behind.
        """
        dtype = np.dtype("uint16" if vocab_size <= 2**16 else "uint32")

        def fill(scratch: Path) -> None:
            ends, labels = array("q"), array("q")
            total = largest = 0
            mask: BinaryIO | None = None
            with (scratch / "tokens.bin").open("wb") as tokens:
                for document in documents:
                    if not len(document):
                        continue
                    tokens.write(document.tokens.astype(dtype).tobytes())
                    if mask is None and not document.trained.all():
                        mask = (scratch / "trained.bin").open("wb")
                        _write_ones(mask, total)
                    if mask is not None:
                        mask.write(document.trained.astype(bool).tobytes())
                    largest = max(largest, int(document.tokens.max()))
                    total += len(document)
                    ends.append(total)
                    if document.label is not None:
                        labels.append(document.label)
                _sync(tokens)
            if mask is not None:
                _sync(mask)
                mask.close()
            if not total:
                raise ConfigError("the data holds no document that can be trained on")
            _save(scratch / "ends.npy", ends)
            if len(labels) == len(ends):
                _save(scratch / "labels.npy", labels)
            known = about | {"dtype": dtype.name, "documents": len(ends), "tokens": total, "largest": largest}
            known |= counts()
            with (scratch / "store.json").open("wb") as file:
                file.write(json.dumps(known, indent=2).encode() + b"\n")
                _sync(file)
            to_disk(scratch)

        replace_folder(folder, fill, what="the token store", overwrite=False)
        to_disk(folder.parent)
        return cls.open(folder)

    @property
    def largest(self) -> int:
        """The highest token id."""
        if "largest" in self.about:
            return self.about["largest"]
        step = len(_ONES)
        return max(int(self.tokens[i : i + step].max()) for i in range(0, len(self.tokens), step))

    def __len__(self) -> int:
        return len(self.ends)

    def document(self, index: int) -> Segment:
        """One whole document."""
        start = int(self.ends[index - 1]) if index else 0
        return self.cut(start, int(self.ends[index]), index)

    def cut(self, start: int, end: int, document: int) -> Segment:
        """Tokens `start:end` of the store, all of them in `document`."""
        tokens = np.asarray(self.tokens[start:end])
        trained = np.ones(len(tokens), bool) if self.trained is None else np.asarray(self.trained[start:end])
        label = None if self.labels is None else int(self.labels[document])
        return Segment(tokens, trained, label)


def _write_ones(file: BinaryIO, count: int) -> None:
    while count:
        ones = _ONES[:count]
        file.write(ones.tobytes())
        count -= len(ones)


def _save(path: Path, numbers: array[int]) -> None:
    with path.open("wb") as file:
        np.save(file, np.frombuffer(numbers, dtype=np.int64))
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
