"""Texts to calibrate on, as token ids of one model."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.evaluation.corpus import shipped_text

if TYPE_CHECKING:
    from trimtab.models.transformer import Model

_CHARACTERS_PER_TOKEN = 64  # no tokenizer needs more of a text of words; bounds what is tokenised


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids int64 [n, T], the data's name, and the sha256 of its content."""

    name: str
    sha256: str
    tokens: Tensor


def read_sequences(data: str, model: Model, *, count: int, length: int, seed: int) -> Sequences:
    """`count` texts of `length` tokens, one drawn from each of `count` equal parts of `data`.

    `data` is "shipped", a text file, or lines of JSON with a "text" or a list "tokens" of token ids each;
    files may end in .gz or .zst. Raises ConfigError where it is missing, unreadable, empty, too short or
    made for another vocabulary.
    """
    if data == "shipped":
        name, whole, digest = data, shipped_text(), hashlib.sha256(shipped_text().encode()).hexdigest()
    else:
        path = Path(data).expanduser()
        content = _bytes(path)
        name, digest = path.name, hashlib.sha256(content).hexdigest()
        whole = _documents(content, path)
    if not len(whole) or (isinstance(whole, str) and not whole.strip()):
        raise ConfigError(f"the calibration data {data!r} is empty")
    if isinstance(whole, list):
        _check_vocabulary(whole, model, data)
        parts = [part[:length] for part in _stretches(whole, count, length, seed)]
    else:
        if model.tokenizer is None:
            raise ConfigError(
                'this model has no tokenizer; give calibration data with a list "tokens" of token ids a line'
            )
        encode = model.tokenizer.encode
        cut = _stretches(whole, count, length * _CHARACTERS_PER_TOKEN, seed)
        parts = [encode(_from_a_word(text))[:length] for text in cut]
    shortest = min(len(part) for part in parts)
    if shortest < length:
        raise ConfigError(
            f"the calibration data {data!r} is too short: one of its {count} parts has {shortest} tokens and "
            f"{length} are needed; give more data, or choose fewer with the options sequences and tokens"
        )
    return Sequences(name, digest, torch.tensor(parts))


def _stretches(whole: Any, count: int, size: int, seed: int) -> list[Any]:
    """From each of `count` equal parts of `whole` a stretch of at most `size`, at a drawn place."""
    rng, part = random.Random(seed), len(whole) // count
    starts = [i * part + rng.randint(0, max(0, part - size)) for i in range(count)]
    return [whole[start : start + min(size, part)] for start in starts]


def _from_a_word(text: str) -> str:
    """`text` without the end of a word that it may begin with."""
    head, space, rest = text.partition(" ")
    return rest if space and len(head) < 40 else text


def _bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.suffix == ".zst":
            return _unpack_zst(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"the calibration data {str(path)!r} does not exist") from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the calibration data {str(path)!r} cannot be read: {reason}") from None


def _unpack_zst(path: Path) -> bytes:
    program = shutil.which("zstd")
    if program is None:
        raise ConfigError(f"reading {str(path)!r} needs the program zstd; install it or unpack the file")
    with path.open("rb") as file:
        run = subprocess.run([program, "-dc"], stdin=file, capture_output=True, check=False)
    if run.returncode:
        raise OSError(run.stderr.decode(errors="replace").strip() or "zstd failed")
    return run.stdout


def _documents(content: bytes, path: Path) -> str | list[int]:
    """All of a file: its text, or its token ids."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"the calibration data {str(path)!r} is not UTF-8; convert it first") from None
    if ".jsonl" not in path.suffixes:
        return text
    texts: list[str] = []
    tokens: list[int] = []
    for number, record in _records(text, path):
        if isinstance(record.get("text"), str):
            texts.append(record["text"])
        elif isinstance(record.get("tokens"), list) and all(type(t) is int for t in record["tokens"]):
            tokens += record["tokens"]
        else:
            raise ConfigError(
                f'line {number} of {str(path)!r} has neither a "text" nor a list "tokens" of token ids'
            )
    if texts and tokens:
        raise ConfigError(f'{str(path)!r} mixes lines with "text" and lines with "tokens"; use one of them')
    return tokens or "\n\n".join(texts)


def _records(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} of {str(path)!r} is not valid JSON ({error})") from None
        yield number, record if isinstance(record, dict) else {}


def _check_vocabulary(tokens: list[int], model: Model, data: str) -> None:
    size = model.config.vocab_size
    foreign = next((t for t in tokens if not 0 <= t < size), None)
    if foreign is not None:
        raise ConfigError(
            f"the calibration data {data!r} has the token id {foreign}, but this model's vocabulary is of "
            f"{size} tokens: it was made with another tokenizer"
        )
