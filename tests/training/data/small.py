"""A small tokenizer with a chat template, and files of every kind with the same three texts."""

from __future__ import annotations

import functools
import gzip
import json
import multiprocessing.queues
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.formats import TextFormat
from trimtab.training.data.store_cache import Reading, cached_store
from trimtab.training.starting.tokenizers.train import TokenizerSettings, train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It was 12 years old.\n\nThen it slept.",
    "Once upon a time there was a naïve café, and 你好 was said.",
    "def solve(x):\n    return x - 1",
]
CHAT = [
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "Write it:"},
    {"role": "assistant", "content": "    return three"},
]


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "texts.txt").write_text("\n".join(TEXTS * 3), encoding="utf-8")
        return train_tokenizer(["texts.txt"], f"{folder}/made", TokenizerSettings(400), root=Path(folder))


def write_lines(path: Path, records: Sequence[object]) -> Path:
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    if path.suffix == ".zst":
        import zstandard

        lines = zstandard.ZstdCompressor().compress(lines)
    elif path.suffix == ".gz":
        lines = gzip.compress(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines)
    return path


def write_table(path: Path, records: Sequence[dict[str, object]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(records))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


def build_and_tell(path: Path, cache: Path, answers: multiprocessing.queues.Queue) -> None:
    """In a process of its own: build a store, and say which one and how many lines of progress there were."""
    lines: list[str] = []
    store = cached_store([path], TextFormat(), tokenizer(), Reading(), cache, lines.append)
    answers.put((store.folder.name, len(store.tokens), len(lines)))
