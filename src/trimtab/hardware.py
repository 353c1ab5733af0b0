"""What this machine is, and how fast it reads memory and multiplies matrices.

Measured rates are ceilings for the machine *as it is now*: a neighbour that uses the same memory lowers
them. They are measured once per process and setting.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LARGE = 512 * 2**20  # bytes; far more than any last-level cache that one process gets to itself
LEAST_SECONDS = 0.02  # a shorter timing would measure the clock
REPEATS = 5
MATMUL_SIZE = 1024


@cache
def describe() -> dict[str, Any]:
    """Processor, memory, system and versions as plain values; what cannot be found out is None."""
    import numpy
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gb": _ram_gb(),
        "gpu": gpu,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
        "compiler": _compiler(),
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _ram_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _compiler() -> str | None:
    from trimtab.kernels.build import compiler

    return compiler()


def read_bandwidth(threads: int | None = None, size: int = LARGE) -> float:
    """GB/s at which `threads` threads read a buffer of `size` bytes over and over; best of several.

    With the default size that is main memory. A buffer that fits a cache is read at that cache's speed:
    give the bytes that a decoding step reads to learn what bounds that step.
    """
    import torch

    return _read_bandwidth(threads or torch.get_num_threads(), size)


@cache
def _read_bandwidth(threads: int, size: int) -> float:
    import torch

    count = max(1, size // 4)
    buffer = torch.ones(count, dtype=torch.float32)
    read = _native_reader(threads) or (lambda b: b.sum())
    with _threads(threads):
        return count * 4 / _best_seconds(lambda: read(buffer)) / 1e9


def _native_reader(threads: int) -> Callable[[torch.Tensor], Any] | None:
    """The kernels' own probe, where they have been built: torch's sum is bound by its additions."""
    import torch

    from trimtab.kernels.build import is_built
    from trimtab.kernels.native import Library

    for name in ("float32", "bfloat16"):
        if is_built(name):
            return Library(getattr(torch, name), threads).read
    return None


def matmul_rate(dtype: str = "float32", threads: int | None = None) -> float:
    """GFLOP/s of torch's product of two square matrices of `dtype` with `threads` threads."""
    import torch

    return _matmul_rate(dtype, threads or torch.get_num_threads())


@cache
def _matmul_rate(dtype: str, threads: int) -> float:
    import torch

    n = MATMUL_SIZE
    a, b = (torch.randn(n, n).to(getattr(torch, dtype)) for _ in range(2))
    with _threads(threads):
        return 2 * n**3 / _best_seconds(lambda: a @ b) / 1e9


def _best_seconds(work: Callable[[], Any]) -> float:
    """Seconds of one call: the fastest of several timings, each long enough to be told from the clock."""
    work()
    calls = 1
    while (seconds := _seconds(work, calls)) < LEAST_SECONDS:
        calls = max(2 * calls, int(calls * LEAST_SECONDS / max(seconds, 1e-7)) + 1)
    return min([seconds, *(_seconds(work, calls) for _ in range(REPEATS - 1))]) / calls


def _seconds(work: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - start


class _threads:
    """Torch's thread count for the length of a `with` block."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        import torch

        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        import torch

        torch.set_num_threads(self.before)
