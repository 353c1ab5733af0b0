"""The server under load: one of our own as a process beside us, or any that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluation.load.client import Client

ENTRY = "from trimtab.cli.main import main; main()"
DEFAULT_CONTEXT = 2048
PRIVATE = ("TRIMTAB_SERVE_", "TRIMTAB_API_KEY")


class ServerProcess:
    """`trimtab serve` with `words` on a free loopback port; a context manager that stops it at the end."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads would stop the server
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-c", ENTRY, "serve", *self._words, "--port", str(self.port)]
        # What the user set for servers in general must not change what is measured here.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(PRIVATE)}
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment)

    def wait(self, timeout_s: float = 300.0) -> float:
        """Seconds until `/health` says 200. Raises TrimtabError with the server's last words if it ends."""
        assert self.process is not None
        begun = time.perf_counter()
        while time.perf_counter() - begun < timeout_s:
            if self.process.poll() is not None:
                raise TrimtabError(f"the server ended before it was ready: {self.last_words()}")
            if healthy(self.port):
                return time.perf_counter() - begun
            time.sleep(0.01)
        raise TrimtabError(f"the server was not ready within {timeout_s:.0f} s: {self.last_words()}")

    def last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else "it said nothing"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, as when the machine takes the memory back."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int | None:
        """End it as an operator would; its exit code."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode

    def __enter__(self) -> ServerProcess:
        self.start()
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    def memory(self) -> int | None:
        """Bytes of physical memory that the process holds; None where the system does not tell."""
        return resident(self.pid)


def free_port() -> int:
    """A loopback port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def healthy(port: int) -> bool:
    """Whether `/health` on the loopback port answers 200."""
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return connection.recv(64).split(b" ", 2)[1:2] == [b"200"]
    return False


def resident(pid: int) -> int | None:
    """Resident bytes of a process (Linux)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")]
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Served:
    """A model as `/v1/models` shows it; `context` None where the server does not tell."""

    name: str
    context: int | None
    chat: bool | None
    record: dict[str, Any]


async def served(client: Client, name: str | None) -> Served:
    """The model called `name`, or the first. Raises TrimtabError if there is none or no answer."""
    for _ in range(2):
        exchange = await client.get("/v1/models")
        if exchange.error is None:
            break
        await asyncio.sleep(0.2)
    if exchange.error is not None:
        raise TrimtabError(f"the server at {client.url} does not answer: {exchange.error}")
    if exchange.status == 401:
        raise TrimtabError(f"the server at {client.url} wants an API key; give it with --api-key")
    if exchange.status == 503:
        raise TrimtabError(f"the server at {client.url} is not ready yet; try again when it is")
    try:
        models = {model["id"]: model for model in json.loads(exchange.body)["data"]}
    except (ValueError, KeyError, TypeError):
        models = {}
    if not models:
        raise TrimtabError(
            f"the server at {client.url} lists no models (status {exchange.status}); "
            "is it an OpenAI-compatible one?"
        )
    chosen = name or next(iter(models))
    if chosen not in models:
        raise TrimtabError(
            f"the server at {client.url} has no model {chosen!r}; it has {', '.join(map(repr, models))}"
        )
    record = models[chosen]
    meta = record.get("meta") or {}  # llama.cpp's
    context = record.get("max_model_len") or meta.get("n_ctx") or meta.get("n_ctx_train")
    return Served(chosen, context, (record.get("trimtab") or {}).get("chat"), record)
