"""All that a run writes step by step."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from trimtab.training.keeping.folder import RunFolder
from trimtab.training.watching.metrics import JsonLines, TensorBoard


class RunLogs:
    """`metrics.jsonl`, `samples.jsonl` and, where asked, `tensorboard/`, each gone back to `step`."""

    def __init__(self, folder: RunFolder, step: int, tensorboard: bool) -> None:
        # First, for it may be missing.
        self._board = TensorBoard(folder.path / "tensorboard", step) if tensorboard else None
        self._metrics = JsonLines(folder.metrics, step)
        self._samples = JsonLines(folder.samples, step)

    def add(self, metrics: dict[str, Any]) -> None:
        """The metrics of a step."""
        self._metrics.add(metrics)
        if self._board is not None:
            self._board.add(metrics)

    def add_samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        """What the model made of the prompts after `step`."""
        pairs = [{"prompt": p, "text": text} for p, text in zip(prompts, texts, strict=True)]
        self._samples.add({"step": step, "samples": pairs})

    def flush(self) -> None:
        """Bring everything to the disk, so that no checkpoint is ahead of it."""
        for log in self._all():
            log.flush()

    def _all(self) -> list[JsonLines | TensorBoard]:
        return [self._metrics, self._samples, *([self._board] if self._board else [])]

    def __enter__(self) -> RunLogs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for log in self._all():
            log.close()
