"""Token stores kept in a cache folder: files are tokenized once for a tokenizer and a way to read them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import ConfigError, OutputError, RequestError
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.encoding import Marked, encode
from trimtab.training.data.formats import Format, TooLong, check_max_tokens, fit
from trimtab.training.data.readers import Problems, iterate_records
from trimtab.training.data.records import BadRecord
from trimtab.training.data.segments import Segment
from trimtab.training.data.token_store import TokenStore

_VERSION = 1  # of what is computed here; a change makes all stores anew
_BATCH_CHARACTERS = 1 << 20
_BATCH_RECORDS = 1_000
_REPORT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read.

    on_error: `stop` at the first record that cannot be used, or `skip` and count such records.
    max_tokens: of a document; None = no limit. `too_long` says what becomes of a longer one.
    """

    encoding: str = "utf-8"
    on_error: Literal["stop", "skip"] = "stop"
    max_tokens: int | None = None
    too_long: TooLong = "drop"

    def __post_init__(self) -> None:
        check_max_tokens(self.max_tokens)


@dataclass(slots=True)
class _Counts:
    """What became of the records, told in `store.json`."""

    problems: Problems
    records: int = 0
    dropped: int = 0
    cut: int = 0
    reported: float = field(default_factory=time.monotonic)

    def told(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "skipped": self.problems.count,
            "first_problem": self.problems.first,
            "dropped": self.dropped,
            "cut": self.cut,
        }


def default_cache() -> Path:
    """The user's cache folder for token stores."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "tokens"


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """The same for tokenizers that turn texts and conversations into the same ids."""
    parts = [tokenizer.backend.to_str(), tokenizer.chat_templates, tokenizer.special_tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cached_store(
    files: Sequence[Path],
    form: Format,
    tokenizer: Tokenizer,
    reading: Reading,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> TokenStore:
    """The token store of `files`, made now unless it is in the cache.

    A store is made anew when a file's place, size or time of change, the tokenizer, its chat template, the
    format or `reading` differ. Processes that want the same store at once wait for the first of them.
    Raises ConfigError for data that cannot be used and OutputError where the cache cannot be written.
    """
    tell = progress or (lambda line: None)
    about = {
        "version": _VERSION,
        "tokenizer": tokenizer_hash(tokenizer),
        "format": {"kind": type(form).__name__} | asdict(form),
        "reading": asdict(reading),
        "files": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = (cache or default_cache()) / f"{files[0].name.split('.')[0]}-{key}"
    if not folder.exists():
        with _alone(folder):
            if not folder.exists():  # else another process has made it meanwhile
                counts = _Counts(Problems(reading.on_error == "skip"))
                documents = _documents(files, form, tokenizer, reading, counts, tell)
                store = TokenStore.write(folder, documents, tokenizer.vocab_size, about, counts.told)
                tell(_summary(store))
                return store
    return TokenStore.open(folder)


def _documents(
    files: Sequence[Path],
    form: Format,
    tokenizer: Tokenizer,
    reading: Reading,
    counts: _Counts,
    tell: Callable[[str], None],
) -> Iterator[Segment]:
    for number, path in enumerate(files, 1):
        for batch in _batches(path, form, tokenizer, reading, counts):
            for segment in encode(tokenizer, batch):
                fitting = fit(segment, reading.max_tokens, reading.too_long, tokenizer.bos_id)
                if fitting is None:
                    counts.dropped += 1
                    continue
                counts.cut += fitting is not segment
                yield fitting
            if time.monotonic() - counts.reported > _REPORT_SECONDS:
                counts.reported = time.monotonic()
                where = f"{path.name} (file {number} of {len(files)})"
                tell(f"tokenizing {where}: {counts.records:,} records so far")


def _batches(
    path: Path, form: Format, tokenizer: Tokenizer, reading: Reading, counts: _Counts
) -> Iterator[list[Marked]]:
    batch: list[Marked] = []
    characters = 0
    for record in iterate_records(path, form.columns, reading.encoding, counts.problems):
        counts.records += 1
        try:
            marked = form.read(record.values, tokenizer)
        except (BadRecord, ConfigError, RequestError) as error:
            counts.problems.meet(f"{record.where}: {error}")
            continue
        batch.append(marked)
        characters += len(marked.text)
        if characters > _BATCH_CHARACTERS or len(batch) == _BATCH_RECORDS:
            yield batch
            batch, characters = [], 0
    yield batch


def _summary(store: TokenStore) -> str:
    about = store.about
    line = f"tokenized {len(store):,} documents, {len(store.tokens):,} tokens"
    for count, what in (("skipped", "skipped"), ("dropped", "too long and dropped"), ("cut", "cut")):
        if about[count]:
            line += f"; {about[count]:,} {what}"
    return line + (f"; the first: {about['first_problem']}" if about["skipped"] else "")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other process makes this store; what a killed one left is swept away."""
    import fcntl

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise OutputError(
            f"the cache of token stores {folder.parent} cannot be written ({error}); set 'cache' to a folder"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.parent.glob(f".{folder.name}.*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        yield
