"""One server with the shipped model for all tests of the HTTP API, and an engine to compare it with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

import trimtab
from serving.server import Server
from trimtab import Engine

TOKENS = 8192  # that a cache has room for: four texts of a full context


@pytest.fixture(scope="session")
def served_engine() -> Engine:
    model = trimtab.load()
    return Engine(model, kv_memory=TOKENS * model.kv_bytes_per_token(), threads=1)


@pytest.fixture(scope="session")
def reference(served_engine: Engine) -> Engine:
    """Has the same weights, and no memory of what was served."""
    return Engine(served_engine.model, kv_memory=served_engine.plan.kv_memory, threads=1)


@pytest.fixture(scope="session")
def running(served_engine: Engine) -> Iterator[Server]:
    other = Engine(served_engine.model, cache="kivi:bits=2", kv_memory="4MiB", threads=1)
    server = Server({"tiny": served_engine, "tiny:kivi:bits=2": other}, stream_interval=0.0, max_n=64)
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The server, with nothing recorded yet; after the test nothing may be left of its requests."""
    running.records.clear()
    yield running
    running.check_idle()


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.openai() as found:
        yield found
