"""Files as blocks of bytes and of text, decompressed on the way; errors name the file and the place."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trimtab.errors import ConfigError

_BLOCK = 1 << 20  # bytes
_COMPRESSED_BLOCK = 1 << 14  # bytes; smaller, for it grows


def read_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, of a `.zst` or `.gz` file its contents.

    Raises ConfigError for a file that cannot be opened, is damaged or breaks off.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".zst":
                yield from _zstandard_blocks(path, file)
            elif path.suffix == ".gz":
                with gzip.open(file) as stream:
                    while block := stream.read(_BLOCK):
                        yield block
            else:
                while block := file.read(_BLOCK):
                    yield block
    except EOFError:
        raise ConfigError(f"{path} breaks off in the middle; copy or download it again") from None
    except (OSError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _zstandard_blocks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ConfigError(f"reading {path} needs the package zstandard: pip install zstandard") from None
    # The library's stream reader takes a file that breaks off for one that ends, this object does not.
    frame = zstandard.ZstdDecompressor().decompressobj()
    begun = False
    while raw := file.read(_COMPRESSED_BLOCK):
        while raw:
            begun = True
            try:
                yield frame.decompress(raw)
            except zstandard.ZstdError as error:
                raise ConfigError(f"{path} is damaged ({error}); copy or download it again") from None
            raw = frame.unused_data
            if frame.eof:
                frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    if begun:
        raise EOFError


def read_text_blocks(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """The text of a file. ConfigError names the line and byte where it is not in `encoding`."""
    try:
        # A byte order mark at the beginning is no text.
        decoder = codecs.getincrementaldecoder("utf-8-sig" if _is_utf8(encoding) else encoding)()
    except LookupError:
        raise ConfigError(f"'encoding' is {encoding!r}, which is no encoding Python knows") from None
    done, lines = 0, 1
    for block in _with_end(read_blocks(path)):
        done += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = done - len(error.object) + error.start
            line = lines + error.object[: error.start].count(b"\n")
            raise ConfigError(
                f"{path}, line {line}: the byte {error.object[error.start]:#04x} at {at} is not {encoding}; "
                "if the file is in another encoding, name it, as in 'encoding: latin-1'"
            ) from None
        lines += text.count("\n")
        if text:
            yield text


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "utf-8"


def _with_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """`blocks` without empty ones, and one empty block after them."""
    yield from (block for block in blocks if block)
    yield b""
