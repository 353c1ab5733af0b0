"""The client and the two loops against a server whose every answer the test decides."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import pytest

from evaluation.load.fake_server import FakeServer, event, stream
from trimtab.errors import ConfigError
from trimtab.evaluation.load.client import Client
from trimtab.evaluation.load.reading import read
from trimtab.evaluation.load.run import closed_loop, open_loop, run_async
from trimtab.evaluation.load.server import free_port

ASK = json.dumps({"prompt": "hello", "max_tokens": 3, "stream": True}).encode()


def on(work, answer=None, **options):
    """Run `work(server, client)` with a server that answers by `answer`."""

    async def main():
        async with FakeServer(answer) as server:
            client = Client(server.url, **options)
            try:
                return await asyncio.wait_for(work(server, client), 20)
            finally:
                await client.close()

    return run_async(main())


def test_a_connection_is_used_again():
    async def work(server, client):
        for _ in range(5):
            exchange = await client.send(client.request("/v1/completions", ASK))
            assert read(exchange, stream=True).output_tokens == 3
        return server.connections

    assert on(work) == 1


def test_a_connection_that_the_server_has_closed_is_not_an_error():
    async def work(server, client):
        server.close_after_each = True
        errors = []
        for _ in range(3):
            errors.append((await client.send(client.request("/v1/completions", ASK))).error)
        return errors, server.connections

    assert on(work) == ([None] * 3, 3)


def test_the_key_and_the_path_before_v1_are_sent():
    async def work(server, client):
        made = Client(f"{server.url}/llm/v1/", "secret")
        await made.get("/v1/models")
        await made.close()
        return server.seen[0]

    path, _, headers = on(work)
    assert path == "/llm/v1/models"
    assert headers["authorization"] == "Bearer secret"
    assert headers["host"].startswith("127.0.0.1:")


def test_an_answer_that_does_not_come_is_given_up():
    async def never(path, body):
        await asyncio.sleep(60)

    async def work(server, client):
        return (await client.send(client.request("/x", b"{}"))).error

    assert on(work, never, timeout_s=0.05) == "no end within 0.05 s"


def test_what_is_not_http_and_what_is_cut_off_are_told():
    async def work(server, client):
        words = [b"220 smtp.example ESMTP\r\n\r\n", b"HTTP/1.1 200 OK\r\n"]

        async def rude(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(words.pop(0))
            writer.close()

        other = await asyncio.start_server(rude, "127.0.0.1", 0)
        rude_client = Client(f"127.0.0.1:{other.sockets[0].getsockname()[1]}")
        errors = [(await rude_client.get("/")).error for _ in range(2)]
        other.close()
        return errors

    assert on(work) == ["not HTTP", "connection lost"]


def test_nobody_there_is_told():
    async def main():
        return (await Client(f"http://127.0.0.1:{free_port()}").get("/")).error

    assert asyncio.run(main()).startswith("no connection")


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:99999"])
def test_a_wrong_address_is_refused(url):
    with pytest.raises(ConfigError, match="--url is"):
        Client(url)


def test_hanging_up_leaves_the_stream():
    gone = asyncio.Event()

    async def endless(path, body):
        async def chunks():
            try:
                while True:
                    yield event({"choices": [{"text": "x"}]})
                    await asyncio.sleep(0.001)
            finally:
                gone.set()

        return chunks()

    async def work(server, client):
        exchange = await client.send(client.request("/v1/completions", ASK), hang_up_after=3)
        return len(exchange.parts), exchange.error

    parts, error = on(work, endless)
    assert parts >= 3
    assert error == "connection lost"


def test_an_open_loop_does_not_wait_for_answers():
    """No answer is given before the last request has come: only an open loop gets there."""
    arrived, all_there = [], asyncio.Event()

    async def together(path, body):
        arrived.append(body)
        if len(arrived) == 20:
            all_there.set()
        await all_there.wait()
        return stream([{"choices": [{"text": "x", "token_ids": [1]}]}])

    async def work(server, client):
        requests = (client.request("/v1/completions", ASK) for _ in itertools.count())
        run = await open_loop(client, requests, [i * 0.002 for i in range(20)], warmup=0.0, seconds=0.04)
        return run, server.connections

    run, connections = on(work, together)
    assert [e.error for e in run.exchanges] == [None] * 20
    assert connections == 20


def test_a_client_that_is_late_shows_it_and_counts_it():
    """A pause of the client: what was due meanwhile is sent late, and its latency begins when it was due."""

    async def work(server, client):
        def stall(share):
            if share == 0.25:
                time.sleep(0.1)

        requests = (client.request("/v1/completions", ASK) for _ in itertools.count())
        return await open_loop(client, requests, [0.01, 0.02, 0.03], warmup=0.0, seconds=0.04, progress=stall)

    run = on(work)
    first, second, third = run.exchanges
    assert [round(e.scheduled - run.start, 6) for e in run.exchanges] == [0.01, 0.02, 0.03]
    assert second.begun - second.scheduled > 0.08
    answer = read(third, stream=True)
    assert answer.lag > 0.07
    assert answer.ttft > answer.lag
    assert first.error is None


def test_a_closed_loop_has_so_many_requests_under_way_at_most():
    under_way, most = 0, 0

    async def counting(path, body):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1
        return stream([{"choices": [{"text": "x", "token_ids": [1]}]}])

    async def work(server, client):
        requests = (client.request("/v1/completions", ASK) for _ in itertools.count())
        return await closed_loop(client, requests, 3, warmup=0.0, seconds=0.1)

    run = on(work, counting)
    assert most == 3
    assert len(run.exchanges) > 3
    assert all(e.error is None for e in run.exchanges)
