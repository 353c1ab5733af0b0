"""Builds the C++ kernels on first use and keeps them in the user's cache folder.

One small shared library a kind, compiled for this very processor by whichever C++20 compiler is
found (`CXX`, g++, clang++). Without a compiler everything still runs on plain torch, only slower; `doctor`
says which of the two is in use.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("trimtab.kernels")

SOURCE = Path(__file__).parent / "cpu"
CPP_TYPES = {"float32": "float", "bfloat16": "bf16", "float16": "f16"}
# A library's kind is the type of weights and cache rows, and this behind it where the weights are int8.
INT8 = "-int8"
FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
]


@functools.cache
def compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trimtab" / "kernels"


@functools.cache
def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    digest.update(" ".join([*FLAGS, compiler() or "", platform.machine()]).encode())
    cpuinfo = Path("/proc/cpuinfo")  # a cache folder may be shared between unlike processors
    if cpuinfo.exists():
        flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))]
        digest.update("".join(flags[:1]).encode())
    return digest.hexdigest()[:16]


def library_path(kind: str) -> Path:
    return cache_folder() / f"trimtab-{kind}-{_key()}.so"


def is_built(kind: str) -> bool:
    return kind.removesuffix(INT8) in CPP_TYPES and library_path(kind).exists()


def build(kind: str) -> Path | None:
    """Path of the library of `kind` (`float32`, `bfloat16-int8`), compiled if need be.

    None where that is impossible.
    """
    target = library_path(kind)
    if target.exists():
        return target
    cxx = compiler()
    if cxx is None or sys.platform == "win32":
        return None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.exists():  # else another process has compiled it meanwhile
                _compile(cxx, kind, target)
        return target
    except OSError as error:
        log.warning("cannot write the kernel cache %s (%s); running on plain torch", target.parent, error)
        return None
    except subprocess.SubprocessError as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[:3]
        log.warning("the CPU kernels did not compile (%s); running on plain torch", " | ".join(detail))
        return None


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Within, no other process compiles a library here; a killed one leaves nothing that holds us up."""
    import fcntl

    folder = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        for left in target.parent.glob(f"{target.stem}-*.tmp"):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(folder)


def _compile(cxx: str, kind: str, target: Path) -> None:
    log.info("compiling the %s CPU kernels once (about 10 s)", kind)
    handle, scratch = tempfile.mkstemp(prefix=f"{target.stem}-", suffix=".tmp", dir=target.parent)
    os.close(handle)
    types = [f"-DTT_TYPE={CPP_TYPES[kind.removesuffix(INT8)]}"]
    if kind.endswith(INT8):
        types.append("-DTT_INT8")
    command = [cxx, *FLAGS, *types, str(SOURCE / "trimtab.cpp"), "-o", scratch]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        os.replace(scratch, target)
    finally:
        Path(scratch).unlink(missing_ok=True)


def build_in_background(kind: str) -> None:
    """Start a detached build, so that a short-lived process need not wait for it; the next one finds it."""
    if compiler() is None or is_built(kind):
        return
    code = f"from trimtab.kernels.build import build; build({kind!r})"
    subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
