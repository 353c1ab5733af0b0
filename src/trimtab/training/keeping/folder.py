"""The output folder of a run: what is where, who may write to it, and what a killed run left behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trimtab.errors import OutputError

_OURS = ("recipe.yaml", "metrics.jsonl", "checkpoints", "tensorboard")


class RunFolder:
    """Places in the output folder, and the lock that keeps a second run out of it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.failures = self.path / "failures"
        self.report = self.path / "report.html"
        self.model = self.path / "model"
        self._handle: int | None = None

    def check(self, resume: bool) -> None:
        """OutputError where something is in the way: a new run wants no folder or an empty one."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise OutputError(f"the output {self.path} is a file; name a folder as 'output'")
        # A run that was killed as it began may have left such a file and nothing else.
        half_written = {scratch_of(self.path / name).name for name in _OURS}
        names = sorted({entry.name for entry in self.path.iterdir()} - half_written)
        is_run = any(name in _OURS for name in names)
        if names and is_run and not resume:
            raise OutputError(
                f"the output folder {self.path} holds a run already; resume it (--resume) or "
                "name another folder"
            )
        if names and not is_run:
            raise OutputError(
                f"the output folder {self.path} holds other things ({', '.join(names[:3])}); "
                "name another folder"
            )

    def lock(self) -> None:
        """Make the folder and hold it until `unlock` or the end of the process, whatever ends it."""
        if self._handle is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._handle = _exclusive(self.path)
        except BlockingIOError:
            raise OutputError(
                f"another run is writing to {self.path}; wait for it or name another folder"
            ) from None
        except OSError as error:
            raise OutputError(f"the output folder {self.path} cannot be used: {error}") from None

    def unlock(self) -> None:
        """Let others have the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def sweep(self) -> None:
        """Remove half-written folders of a killed run; only while locked."""
        left = [*self.path.glob(".*.tmp"), *self.path.glob(".model.*")]
        left += [*self.checkpoints.glob(".step-*"), *self.failures.glob(".step-*")]
        for path in left:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _exclusive(folder: Path) -> int:
    """A handle whose lock the system lifts when the process ends; BlockingIOError where it is held."""
    try:
        import fcntl
    except ImportError:  # Windows: keep a file open that no other process can open for writing
        import msvcrt

        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            os.close(handle)
            raise BlockingIOError from None
        return handle
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def to_disk(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk: a rename is atomic only for what is there."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and needs none flushed
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def scratch_of(path: Path) -> Path:
    """Where `write_whole` writes what is then put into `path`."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, content: str | bytes) -> None:
    """Put `content` into `path` at once: a reader or a kill finds the old file or the new one."""
    scratch = scratch_of(path)
    try:
        with scratch.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OutputError(f"{path} could not be written: {error}") from None
