"""A run's numbers as JSON lines, one a step, and for TensorBoard where asked."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, OutputError
from trimtab.training.keeping.folder import write_whole


class JsonLines:
    """A file to which objects with a `step` are added, each as a line of its own.

    Opening it cuts it back to `step`: what a killed run wrote after its last checkpoint is written again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [record for record in read_lines(path) if record["step"] <= step]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
        try:
            self._handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise OutputError(f"{path} could not be written: {error}") from None

    def add(self, record: dict[str, Any]) -> None:
        """Add one line."""
        line = (json.dumps(record) + "\n").encode()
        try:
            while line:  # a disk that fills up takes the first part, and says so at the second
                line = line[os.write(self._handle, line) :]
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error}") from None

    def flush(self) -> None:
        """Bring all lines to the disk, so that no checkpoint is ahead of them."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error}") from None

    def close(self) -> None:
        os.close(self._handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; a torn last line is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


class TensorBoard:
    """The numbers of each step as TensorBoard scalars; `step` is where a resumed run goes on."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "'tensorboard: true' needs the package tensorboard; install it (pip install tensorboard) "
                "or leave the setting out"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
