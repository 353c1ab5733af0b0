"""A real server process for tests: `with Served("--plan", "full") as server: server.post(...)`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.client import HTTPConnection
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

CALL = [sys.executable, "-c", "from trimtab.cli.main import main; main()", "serve"]
PATIENCE_S = 120.0  # for a loaded machine; what is waited for takes seconds


class Served:
    """`trimtab serve` on a free port. `lines` is what it has written to stderr so far."""

    def __init__(self, *words: str, port: int = 0, **environ: str) -> None:
        self.process = subprocess.Popen(
            [*CALL, "--port", str(port), *words],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        )
        self.lines: list[str] = []
        self.port = 0
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line that has the pattern."""

        def found() -> re.Match[str] | None:
            return next((m for line in self.lines if (m := re.search(pattern, line))), None)

        with self._news:
            ended = lambda: self.process.poll() is not None and not self._reader.is_alive()  # noqa: E731
            self._news.wait_for(lambda: found() or ended(), PATIENCE_S)
            match = found()
        assert match, f"no line with {pattern!r}; the server wrote {self.lines}"
        return match

    def wait_ready(self) -> Served:
        self.wait_listening()
        self.wait_for("is ready at")
        return self

    def wait_listening(self) -> None:
        self.port = int(self.wait_for(r"listening on http://[^,]*:(\d+)")[1])

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of one request; `body` is sent as JSON."""
        connection = self.connect()
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def open_stream(self, **body: Any) -> tuple[HTTPConnection, Any]:
        """A stream of `/v1/completions` of which the head has come."""
        connection = self.connect()
        wanted = {"model": "tiny", "prompt": "Once upon a time", "stream": True, "ignore_eos": True, **body}
        connection.request(
            "POST", "/v1/completions", json.dumps(wanted), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return connection, answer

    def gauge(self, name: str, model: str = "tiny") -> float:
        """The value of one of `/metrics` for a model."""
        text = self.ask("GET", "/metrics")[1].decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"trimtab_{name}" and sample.labels.get("model_name") == model:
                    return sample.value
        raise KeyError(name)

    def stop(self, number: int) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.ended()


def events(answer: Any) -> list[Any]:
    """The rest of a stream: each event's JSON, `"[DONE]"` last."""
    found = []
    for line in answer:
        if line.startswith(b"data: "):
            text = line[6:].decode().strip()
            found.append(text if text == "[DONE]" else json.loads(text))
    return found
