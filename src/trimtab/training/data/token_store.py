"""Tokenized documents in memory-mapped files, made once for a set of files and a tokenizer.

`tokens.bin` holds the tokens of all documents end to end, `ends.npy` where each ends, `trained.bin` which
tokens are predicted (only where not all are). The folder is written beside its place and renamed, so a
store is whole or not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.models.save import replace_folder
from trimtab.training.data.segments import Segment


@dataclass(frozen=True)
class TokenStore:
    """Documents as tokens.

    Attributes:
        tokens: uint16 or uint32, memory-mapped.
        ends: int64 `[documents]`, the index after each document's last token.
        trained: bool, memory-mapped, or None where every token is predicted.
        labels: int64 `[documents]`, or None.
    """

    folder: Path
    tokens: np.ndarray
    ends: np.ndarray
    trained: np.ndarray | None
    labels: np.ndarray | None

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """The store in `folder`."""
        about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r")
        mask, labels = folder / "trained.bin", folder / "labels.npy"
        trained = np.memmap(mask, dtype=bool, mode="r") if mask.exists() else None
        return cls(
            folder,
            tokens,
            np.load(folder / "ends.npy"),
            trained,
            np.load(labels) if labels.exists() else None,
        )

    @classmethod
    def write(cls, folder: Path, documents: Iterable[Segment], vocab_size: int, about: dict) -> TokenStore:
        """Write `documents` to a new store; `about` is kept in `store.json` for readers."""
        dtype = "uint16" if vocab_size <= 2**16 else "uint32"

        def fill(scratch: Path) -> None:
            ends, labels, total, masked = [], [], 0, False
            with (scratch / "tokens.bin").open("wb") as tokens, (scratch / "trained.bin").open("wb") as mask:
                for document in documents:
                    tokens.write(document.tokens.astype(dtype).tobytes())
                    mask.write(document.trained.astype(bool).tobytes())
                    masked = masked or not document.trained.all()
                    total += len(document)
                    ends.append(total)
                    labels.append(document.label)
            if not masked:
                (scratch / "trained.bin").unlink()
            np.save(scratch / "ends.npy", np.asarray(ends, dtype=np.int64))
            if labels and labels[0] is not None:
                np.save(scratch / "labels.npy", np.asarray(labels, dtype=np.int64))
            known = about | {"dtype": dtype, "documents": len(ends), "tokens": total}
            (scratch / "store.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

        replace_folder(folder, fill, what="the token store", overwrite=False)
        return cls.open(folder)

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
