"""What the benchmarks share: taking turns, ratios, tables, the machine's name, and the JSON line.

Speeds on a shared machine drift by the minute. So contenders take turns (A B C, A B C, ...) in one process,
a ratio is taken within each round, and the median over rounds is what counts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimtab import hardware
from trimtab.evaluation.provenance import provenance
from trimtab.kernels.build import build
from trimtab.kernels.native import Library

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results"
INSTALL = {
    "transformers": "pip install transformers",
    "llama_cpp": "pip install llama-cpp-python",
    "gguf": "pip install gguf",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run: tokens made, wall seconds end to end, and seconds a token after the first."""

    tokens: int
    seconds: float
    token_s: float | None = None

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=(description or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=positive, default=2, help="threads of every contender (default 2)")
    parser.add_argument(
        "--rounds", type=positive, default=5, help="how often contenders take turns (default 5)"
    )
    parser.add_argument("--save", action="store_true", help="write the results to benchmarks/results/")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, set torch's threads and say if the machine is busy with something else."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if (options.load_average or 0) > 0.5:
        # Whoever waits at barriers suffers most from neighbours, so ratios are not spared either.
        progress(f"the machine is busy (load average {options.load_average:.1f}): do not trust the ratios")
    return options


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def missing(*modules: str) -> str | None:
    """Why a row is left out: the first of `modules` that is not installed, and how to get it."""
    for name in modules:
        try:
            __import__(name)
        except (ImportError, OSError, RuntimeError) as error:
            absent = isinstance(error, ModuleNotFoundError)
            return f"not installed ({INSTALL[name]})" if absent else f"does not load: {error}"
    return None


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def alternate(
    contenders: Mapping[str, Callable[[], Sample]], rounds: int, warm_ups: int = 1
) -> dict[str, list[Sample]]:
    """`rounds` samples of each contender, taken in turns. Every other round goes in reverse order, so that
    none always runs behind the same neighbour."""
    for name, run in contenders.items():
        progress(f"warming up {name}")
        for _ in range(warm_ups):
            run()
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for index in range(rounds):
        names = list(contenders)
        for name in names if index % 2 == 0 else reversed(names):
            samples[name].append(contenders[name]())
        said = ", ".join(f"{name} {taken[-1].rate:.0f}" for name, taken in samples.items())
        progress(f"round {index + 1} of {rounds}, tokens/s: {said}")
    return samples


def rate(samples: Sequence[Sample]) -> float:
    """Median tokens per second, end to end."""
    return statistics.median(s.rate for s in samples)


def token_seconds(samples: Sequence[Sample]) -> float | None:
    """Median seconds a token after the first; None where a contender does not tell."""
    times = [s.token_s for s in samples if s.token_s is not None]
    return statistics.median(times) if times else None


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> dict[str, float]:
    """How many times as fast we are: median, least and greatest over the rounds."""
    each = [a.rate / b.rate for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def ratio_text(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['median']:.2f}x ({value['min']:.2f}-{value['max']:.2f})"


class ReadProbe:
    """Bandwidth at which a device reads a buffer, asked now and then while contenders take turns.

    `size` None: far more than any cache holds, so main memory's bandwidth. `typical` is the ceiling: the
    median of all asked, as for the contenders, each of them the best of three.
    """

    def __init__(self, threads: int, size: int | None = None, device: torch.device = CPU) -> None:
        large = hardware.LARGE if device.type == "cpu" else 8 * hardware.LARGE
        self.size = large if size is None else max(4096, size) // 4 * 4
        self.seen: list[float] = []
        self._calls = max(1, hardware.LARGE // 2 // self.size)
        self._device = device
        self._buffer = torch.ones(self.size // 4, device=device)
        self._read: Callable[[torch.Tensor], Any] = torch.sum
        if device.type == "cpu" and build("float32") is not None:
            self._read = Library(torch.float32, threads).read

    def ask(self) -> float:
        """GB/s now: the best of three timings after a first one that does not count."""
        self._seconds()
        times = [self._seconds() for _ in range(3)]
        self.seen.append(self.size / min(times) / 1e9)
        return self.seen[-1]

    def _seconds(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(self._calls):
            self._read(self._buffer)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / self._calls

    @property
    def typical(self) -> float:
        return statistics.median(self.seen or [self.ask()])


@dataclass
class Claim:
    """A promised number. `value` None: not measured here, `why` says the reason."""

    name: str
    value: float | None
    target: float
    at_most: bool = False
    why: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def line(self) -> str:
        sign = "<=" if self.at_most else ">="
        if self.value is None:
            return f"{self.name}: not measured, {self.why} (target {sign} {self.target:g})"
        verdict = "met" if self.met else "NOT met"
        return f"{self.name}: {self.value:.2f} (target {sign} {self.target:g}): {verdict}"


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self.columns), (cells, self.columns)
        self.rows.append(cells)

    def show(self) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        # Redirected output has no width of its own; a table folded to 80 columns cannot be read.
        console = Console(width=None if sys.stdout.isatty() else 150)
        shown = RichTable(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            shown.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown, markup=False)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|---" + "|---:" * (len(self.columns) - 1) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def versions() -> dict[str, str | None]:
    """Versions of what is compared; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in ("trimtab", "torch", "transformers", "llama-cpp-python", "gguf", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def finish(
    name: str,
    tables: Sequence[Table],
    claims: Sequence[Claim],
    record: Mapping[str, Any],
    options: argparse.Namespace,
    seed: int = 0,
) -> None:
    """Print tables, claims and the JSON line; with `--save` also write them to `results/`."""
    origin = provenance(seed)
    origin["versions"] = origin["versions"] | versions()
    whole = {
        "benchmark": name,
        "claims": [
            {"name": c.name, "value": c.value, "target": c.target, "at_most": c.at_most, "met": c.met}
            for c in claims
        ],
        **record,
        "options": {option: _without_folder(value) for option, value in vars(options).items()},
        **origin,
        "command": _without_folder(origin["command"]),
    }
    machine = _machine(origin)
    if options.load_average is not None:
        machine += f"; load average before: {options.load_average:.1f}"
    for table in tables:
        table.show()
    for claim in claims:
        print(claim.line())
    print(machine)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        stem = f"{name}-{_slug(origin)}"
        parts = [f"# {name}", machine, *(t.markdown() for t in tables), *(f"- {c.line()}" for c in claims)]
        (RESULTS / f"{stem}.md").write_text(
            "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n", encoding="utf-8"
        )
        (RESULTS / f"{stem}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        progress(f"wrote {stem}.md and .json")
    print(json.dumps(whole))


def _machine(origin: Mapping[str, Any]) -> str:
    hw, vs = origin["hardware"], origin["versions"]
    packages = ", ".join(f"{k} {v}" for k, v in vs.items() if v is not None)
    return (
        f"{hw['cpu']}, {hw['cores']} cores, {hw['ram_gb']} GB RAM, {hw['gpu'] or 'no GPU'}; {packages}; "
        f"{hw['compiler'] or 'no compiler'}; {origin['date']}, commit {origin['commit'] or 'unknown'}"
    )


def _without_folder(value: Any) -> Any:
    """Results are published: where something lies on one machine is nobody's business."""
    if isinstance(value, list):
        return [_without_folder(one) for one in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _slug(origin: Mapping[str, Any]) -> str:
    cpu = re.sub(r"[^a-z0-9]+", "-", (origin["hardware"]["cpu"] or "unknown").lower()).strip("-")
    return f"{cpu}-{origin['hardware']['cores']}-cores"
