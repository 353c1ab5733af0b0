"""One server process from its first breath to its last: listen, load, serve, drain, exit.

It listens before it loads, so that whoever watches it sees 503 instead of a refused connection. The web
framework, torch and the model come in a thread meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from trimtab import __version__
from trimtab.serving.address import BACKLOG, is_local, listen, url_of
from trimtab.serving.front import Front
from trimtab.serving.limits import wrap
from trimtab.serving.metrics import Metrics
from trimtab.serving.request_log import RequestLog

if TYPE_CHECKING:
    from trimtab.serving.settings import ServerSettings
    from trimtab.serving.worker import Worker

KEEP_ALIVE_S = 75  # longer than proxies keep theirs, so that it is they who close
_LAST_WORDS_S = 5  # after the drain: for cancelled requests to say so, before the connections are cut


def serve(settings: ServerSettings) -> int:
    """Serve until a signal says stop. Returns the exit code.

    Raises TrimtabError if the server cannot start: address taken, model missing, a plan that cannot run.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("trimtab").setLevel(logging.INFO)  # tells of kernels being compiled, and why torch runs
    _allow_connections()
    requests = RequestLog(settings.log_file, prompts=settings.log_prompts) if settings.log_requests else None
    try:
        return _Process(settings, listen(settings.host, settings.port), requests).run()
    finally:
        if requests is not None:
            requests.close()


def _allow_connections() -> None:
    """Take all the open files that this process may have: each connection is one."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
            log_level="error",  # below that it warns of what strangers send
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
        with suppress(RuntimeError):  # a signal may have ended the loop meanwhile
            self.loop.call_soon_threadsafe(*call)  # type: ignore[arg-type]

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
        # Full collections come when a share of what the last one saw is new: let that be little from now on.
        gc.collect()
        self._say_ready()

    def _say_ready(self) -> None:
        settings = self.settings
        _say(f"trimtab {__version__} is ready at {self.url}")
        width = max(map(len, settings.names))
        for name, plan in zip(settings.names, settings.plans, strict=True):
            _say(f"  model {name:{width}}  plan {plan}")
        if not settings.api_key and not is_local(self.sock):
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


def _say(text: str) -> None:
    """A line for people, on stderr; a terminal that has gone away does not stop a server."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
