"""One server process from its first breath to its last: listen, load, serve, drain, exit.

It listens before it loads, so that whoever watches it sees 503 instead of a refused connection. Web framework,
torch and model come in a thread meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab import __version__
from trimtab.errors import ConfigError
from trimtab.serving.limits import refuse, wrap
from trimtab.serving.metrics import CONTENT_TYPE, Metrics
from trimtab.serving.request_log import RequestLog

if TYPE_CHECKING:
    from trimtab.serving.settings import ServerSettings
    from trimtab.serving.worker import Worker

BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than proxies keep theirs, so that it is they who close
_LAST_WORDS_S = 5  # after the drain: for cancelled requests to say so, before the connections are cut


def serve(settings: ServerSettings) -> int:
    """Serve until a signal says stop. Returns the exit code.

    Raises TrimtabError if the server cannot start: address taken, model missing, a plan that cannot run.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    requests = RequestLog(settings.log_file, prompts=settings.log_prompts) if settings.log_requests else None
    try:
        return _Process(settings, listen(settings.host, settings.port), requests).run()
    finally:
        if requests is not None:
            requests.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError with what is wrong with the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"host is {host!r}, which is no known address; try 127.0.0.1 or 0.0.0.0") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reasons = {
            errno.EADDRINUSE: f"port {port} on {host} is in use; choose another with --port, or 0 for a free one",
            errno.EACCES: f"port {port} is not for this user; choose one of at least 1024 with --port",
            errno.EADDRNOTAVAIL: f"host is {host!r}, which is no address of this machine; try 127.0.0.1",
        }
        fallback = f"cannot listen on {host}, port {port}: {error.strerror}"
        raise ConfigError(reasons.get(error.errno or 0, fallback)) from None
    return sock


def url_of(sock: socket.socket, path: str = "") -> str:
    """The address that a listening socket is reached at from this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def build_worker(settings: ServerSettings) -> Worker:
    """Engines for all plans on one loaded model, each tried out once, and the worker that will run them.

    Takes as long as the model takes to load. Raises TrimtabError if a plan cannot run.
    """
    from trimtab import Engine, SamplingParams
    from trimtab.serving.worker import Worker

    engines: dict[str, Engine] = {}
    model = None
    for name, plan in zip(settings.names, settings.plans, strict=True):
        engine = Engine(model, plan=plan)
        model = engine.model
        # What is set up on first use is set up now; what cannot run shows now.
        engine.generate([[0]], SamplingParams(max_tokens=2, ignore_eos=True))
        engine.reset_stats()
        engines[name] = engine
    return Worker(engines, max_waiting=settings.max_queue)


class Front:
    """What is at the socket from the start: the metrics, and 503 until there is an app to hand over to."""

    def __init__(self, metrics: Metrics, root_path: str = "") -> None:
        self.app: ASGIApp | None = None
        self._metrics = metrics
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(self._root_path)
        if path == "/metrics" and scope["method"] in ("GET", "HEAD"):
            await _answer(send, 200, CONTENT_TYPE, self._metrics.text())
        elif self.app is not None:
            await self.app(scope, receive, send)
        elif path == "/health":
            await _answer(send, 503, "application/json", b'{"status":"loading"}')
        else:
            message = "the server is still loading; try again soon"
            later = [(b"retry-after", b"1")]
            await refuse(send, 503, message, code="not_ready", kind="service_unavailable", headers=later)


async def _answer(send: Send, status: int, kind: str, body: bytes) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    """Uvicorn's server with the signals left to us: its own end with the signal that stopped it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Process:
    """The parts of a running server, and what signals do to them. All methods but `_load` run in the loop."""

    def __init__(self, settings: ServerSettings, sock: socket.socket, requests: RequestLog | None) -> None:
        self.settings = settings
        self.sock = sock
        self.requests = requests
        self.metrics = Metrics(settings.names)
        self.front = Front(self.metrics, settings.root_path)
        self.url = url_of(sock, settings.root_path)
        self.worker: Worker | None = None
        self.stopping = False
        self.failure: BaseException | None = None
        self.loader = threading.Thread(target=self._load, name="trimtab-load", daemon=True)
        self.drainer: threading.Thread | None = None
        config = uvicorn.Config(
            self.front,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=settings.access_log,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(settings.drain_timeout) + _LAST_WORDS_S,
        )
        if settings.access_log:
            logging.getLogger("uvicorn.access").setLevel(logging.INFO)
        self.server = _Server(config)

    def run(self) -> int:
        with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            runner.run(self._main())
        if self.loader.is_alive():
            # Torch is being imported or the model read in the other thread, which cannot be told to stop.
            sys.stderr.flush()
            os._exit(0)
        if self.failure is not None:
            raise self.failure
        return 0

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._on_signal, number)
        _say(f"listening on {self.url}, loading {self.settings.plans[0].model or 'the shipped model'}")
        self.loader.start()
        await self.server.serve(sockets=[self.sock])
        if self.drainer is not None:
            await asyncio.to_thread(self.drainer.join)

    # --- loading

    def _load(self) -> None:
        try:
            from trimtab.serving.app import create_app

            worker = build_worker(self.settings)
            app = create_app(worker, self.settings)
            app.state.observers += [self.metrics, *([self.requests] if self.requests else [])]
            ready = wrap(app, self.settings)
        except BaseException as error:
            self._in_loop(self._failed, error)
            return
        self._in_loop(self._loaded, worker, ready)

    def _in_loop(self, *call: object) -> None:
        try:
            self.loop.call_soon_threadsafe(*call)  # type: ignore[arg-type]
        except RuntimeError:  # a signal has ended the loop meanwhile
            pass

    def _failed(self, error: BaseException) -> None:
        self.failure = error
        self.server.should_exit = True

    def _loaded(self, worker: Worker, app: ASGIApp) -> None:
        if self.stopping:
            return
        self.worker = worker
        worker.start()
        self.metrics.watch(worker)
        self.front.app = app
        # The model's objects are here to stay; a collection need not walk them in the middle of a stream.
        gc.collect()
        gc.freeze()
        self._say_ready()

    def _say_ready(self) -> None:
        settings = self.settings
        _say(f"trimtab {__version__} is ready at {self.url}")
        width = max(map(len, settings.names))
        for name, plan in zip(settings.names, settings.plans, strict=True):
            _say(f"  model {name:{width}}  plan {plan}")
        if not settings.api_key and not _is_local(self.sock):
            _say("  anyone who reaches this address can use it: set an API key in TRIMTAB_API_KEY")

    # --- the end

    def _on_signal(self, number: int) -> None:
        if self.stopping:
            _say("stopped at once, as asked twice")
            os._exit(128 + number)
        self.stopping = True
        self.server.should_exit = True
        worker = self.worker
        if worker is None:
            return
        _say(f"stopping; what is under way has {self.settings.drain_timeout:g} s to end")
        self.drainer = threading.Thread(
            target=worker.stop, args=(self.settings.drain_timeout,), name="trimtab-drain", daemon=True
        )
        worker.drain()
        self.drainer.start()


def _is_local(sock: socket.socket) -> bool:
    host = sock.getsockname()[0]
    return host.startswith("127.") or host == "::1"


def _say(text: str) -> None:
    """A line for people, on stderr; a terminal that has gone away does not stop a server."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass
