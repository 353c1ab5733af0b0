"""Writing several files so that either all of them are there and whole, or none is touched."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from trimtab.errors import OutputError


def check_writable(folder: Path) -> None:
    """Make `folder` and put a file there and away again, so that a long run fails before it starts."""
    write_all(folder, {})


def write_all(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write `files` (name -> content) into `folder`, which is made if need be; the paths written.

    Everything is written aside and flushed to disk before the first file is put in its place. Raises
    OutputError, with the old files left as they were, when the disk is full or writing is not allowed.
    """
    aside: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**files, **({} if files else {".trimtab": b""})}.items():
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}-")
            aside.append((Path(temporary), folder / name))
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if files:
            for temporary, final in aside:
                temporary.chmod(0o644)
                temporary.replace(final)
        return [folder / name for name in files]
    except OSError as error:
        raise OutputError(
            f"cannot write to the folder {str(folder)!r}: {(error.strerror or str(error)).lower()}; "
            "free some space or name another folder"
        ) from None
    finally:
        for temporary, _ in aside:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
