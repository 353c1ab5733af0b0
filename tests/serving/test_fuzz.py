"""Requests made up from the API's own description: whatever comes in, no answer is a failure of ours.

Most of what is made up is refused early, so a part of the bodies is mended a little.
"""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from serving.process import Served
from trimtab.serving.limits import wrap
from trimtab.serving.run import build_worker
from trimtab.serving.settings import ServerSettings

FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
MANY = settings(
    max_examples=600, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, database=None
)


@pytest.fixture(scope="module")
def here():
    """The whole app in this process."""
    from trimtab.serving.app import create_app

    chosen = ServerSettings(max_n=4, max_queue=64, request_timeout=20)
    worker = build_worker(chosen)
    worker.start()
    app = create_app(worker, chosen)
    schema = schemathesis.openapi.from_asgi("/openapi.json", wrap(app, chosen))
    yield schema
    worker.stop(0)
    stats = worker.stats("tiny")
    assert (stats.running, stats.waiting, stats.engine.kv_bytes_held) == (0, 0, 0)


@pytest.fixture(scope="module")
def there():
    """A real server, asked over the network."""
    words = ["--max-n", "4", "--max-queue", "64", "--request-timeout", "20s", "--no-log-requests"]
    with Served(*words) as server:
        server.wait_ready()
        address = f"http://127.0.0.1:{server.port}/openapi.json"
        yield schemathesis.openapi.from_url(address)
        assert [server.gauge(n) for n in ("num_requests_running", "kv_bytes_held")] == [0, 0]
        assert not any("Traceback" in line for line in server.lines)


def mend(case):
    """Make two thirds of the bodies more like what a client sends that means it.

    Of these one half keeps what was made up but for the model and the amounts; the other is a plain request
    with one or two of the made-up fields.
    """
    body = case.body
    if not isinstance(body, dict) or len(str(body)) % 3 == 0:
        return
    if len(str(body)) % 3 == 1:
        fields = sorted(set(body) - {"model", "max_tokens"}, key=str)
        start = len(str(body)) // 3 % len(fields) if fields else 0
        kept = {name: body[name] for name in fields[start : start + 2]}
        plain = (
            {"messages": [{"role": "user", "content": "Tell me."}]}
            if "chat" in case.path
            else {"prompt": "On"}
        )
        body.clear()
        body |= plain | kept
    body["model"] = "tiny"
    for name, most in (("max_tokens", 8), ("max_completion_tokens", 8), ("n", 2), ("best_of", 3)):
        if isinstance(body.get(name), int) and body[name] > most:
            body[name] = most
    if "max_completion_tokens" not in body:
        body.setdefault("max_tokens", 8)


def fuzz(schema, examples):
    """Make requests up for every operation, as described and against the description, and send them."""
    modes = list(schemathesis.GenerationMode)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/completions", "/v1/chat/completions"} <= {operation.path for operation in operations}
    for operation in operations:
        # Where there is nothing to fill in there is one request to make.
        each = examples if operation.body else settings(examples, max_examples=3)

        @each
        @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
        def send(case):
            mend(case)
            case.call_and_validate(checks=[not_a_server_error])

        send()


def test_a_few_made_up_requests(here):
    fuzz(here, FEW)


@pytest.mark.slow
def test_many_made_up_requests(there):
    fuzz(there, MANY)
