"""What a run says while it goes on: a live line on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

SMOOTHING = 0.95  # of the loss shown: the mean of about the last 20 steps


class Progress:
    """Shows metrics on stderr; within the `with` block a terminal has a line that is rewritten.

    Args:
        steps: of the whole run.
        every: seconds between two plain lines where stderr is no terminal.
    """

    def __init__(self, steps: int, every: float, console: Console | None = None) -> None:
        self.steps, self.every = steps, every
        self.console = console or Console(stderr=True, highlight=False)
        self._live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self._smoothed, self._weight = 0.0, 0.0
        self._validation: float | None = None
        self._begun, self._first, self._shown = time.monotonic(), -1, -every

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text), soft_wrap=True)

    def update(self, metrics: dict[str, Any]) -> None:
        """Take in the metrics of a step."""
        if self._first < 0:
            self._first = metrics["step"] - 1
        self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * metrics["loss"]
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self._validation = metrics.get("validation_loss", self._validation)
        now = time.monotonic()
        if self._live is not None:
            self._live.update(Text(self.line(metrics, now)))
        elif now - self._begun - self._shown >= self.every or metrics["step"] == self.steps:
            self._shown = now - self._begun
            self.say(self.line(metrics, now))

    def line(self, metrics: dict[str, Any], now: float) -> str:
        """One line with everything."""
        step = metrics["step"]
        left = (now - self._begun) / (step - self._first) * (self.steps - step)
        parts = [
            f"step {step:,}/{self.steps:,}",
            f"loss {self._smoothed / self._weight:.4f}",
            "" if self._validation is None else f"validation {self._validation:.4f}",
            f"lr {metrics['lr']:.2e}",
            f"grad {metrics['grad_norm']:.3f}",
            f"{metrics['tokens_per_second']:,.0f} tok/s",
            f"{metrics['flops_per_second'] / 1e9:,.0f} GFLOP/s ({metrics['flops_share']:.0%})",
            f"{duration(left)} left",
        ]
        return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole} s"
