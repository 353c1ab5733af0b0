"""/metrics: Prometheus' own parser reads it, and the counts are those of the requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from trimtab.engine.engine import EngineStats
from trimtab.serving.metrics import Metrics
from trimtab.serving.observe import RequestRecord
from trimtab.serving.worker import WorkerStats


def samples(metrics):
    """{(name, sorted labels): value} of all that is shown."""
    families = text_string_to_metric_families(metrics.text().decode())
    found = [(s.name, tuple(sorted(s.labels.items())), s.value) for f in families for s in f.samples]
    assert len({s[:2] for s in found}) == len(found)
    return {(name, labels): value for name, labels, value in found}


def value(metrics, name, **labels):
    return samples(metrics)["trimtab_" + name, tuple(sorted(labels.items()))]


def record(**more):
    return RequestRecord(**{"id": "1", "route": "/v1/completions", "client": None, "model": "tiny", **more})


def stats(**more):
    names = EngineStats.__dataclass_fields__
    return WorkerStats(EngineStats(**{**dict.fromkeys(names, 0), **more}), running=3, waiting=4)


@pytest.fixture
def metrics():
    return Metrics(["tiny", "tiny:kivi"])


def test_requests_and_tokens_are_counted(metrics):
    for _ in range(2):
        metrics(record(prompt_tokens=7, completion_tokens=3, finish_reasons=["stop", "length"]))
    metrics(record(status=429, error="full"))
    assert value(metrics, "requests_total", model_name="tiny", route="/v1/completions", status="200") == 2
    assert value(metrics, "requests_total", model_name="tiny", route="/v1/completions", status="429") == 1
    assert value(metrics, "request_success_total", model_name="tiny", finished_reason="stop") == 2
    assert value(metrics, "request_success_total", model_name="tiny", finished_reason="length") == 2
    assert value(metrics, "prompt_tokens_total", model_name="tiny") == 14
    assert value(metrics, "generation_tokens_total", model_name="tiny") == 6


def test_times_go_into_histograms(metrics):
    metrics(
        record(
            queue_s=0.002, ttft_s=0.2, total_s=1.5, inter_token_s=[0.02, 0.02, 9.0], finish_reasons=["stop"]
        )
    )
    metrics(record(status=400, total_s=0.001))
    model = {"model_name": "tiny"}
    assert value(metrics, "request_queue_time_seconds_count", **model) == 1
    assert value(metrics, "time_to_first_token_seconds_bucket", le="0.15", **model) == 0
    assert value(metrics, "time_to_first_token_seconds_bucket", le="0.2", **model) == 1
    assert value(metrics, "inter_token_latency_seconds_count", **model) == 3
    assert value(metrics, "inter_token_latency_seconds_sum", **model) == pytest.approx(9.04)
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.025", **model) == 2
    assert value(metrics, "e2e_request_latency_seconds_count", **model) == 1  # a refusal is no latency
    assert value(metrics, "e2e_request_latency_seconds_sum", **model) == 1.5


def test_series_of_served_models_are_there_from_the_start(metrics):
    for name in ("tiny", "tiny:kivi"):
        assert value(metrics, "generation_tokens_total", model_name=name) == 0
        assert value(metrics, "time_to_first_token_seconds_count", model_name=name) == 0


def test_names_that_clients_invent_make_no_series(metrics):
    for i in range(50):
        metrics(record(model=f"gpt-{i}", status=404))
    metrics(record(model=None, status=400))
    assert value(metrics, "requests_total", model_name="unknown", route="/v1/completions", status="404") == 50
    assert "gpt-" not in metrics.text().decode()


def test_engines_are_asked_when_the_metrics_are(metrics):
    assert value(metrics, "ready") == 0
    assert not any(name == "trimtab_num_requests_running" for name, _ in samples(metrics))
    worker = SimpleNamespace(ready=True, names=["tiny", "tiny:kivi"])
    now = {"tiny": stats(kv_bytes_held=50, kv_bytes_capacity=200), "tiny:kivi": stats(preemptions=9)}
    worker.stats = now.__getitem__
    metrics.watch(worker)
    assert value(metrics, "ready") == 1
    assert value(metrics, "num_requests_running", model_name="tiny") == 3
    assert value(metrics, "num_requests_waiting", model_name="tiny:kivi") == 4
    assert value(metrics, "kv_bytes_held", model_name="tiny") == 50
    assert value(metrics, "kv_cache_usage_ratio", model_name="tiny") == 0.25
    assert value(metrics, "kv_cache_usage_ratio", model_name="tiny:kivi") == 0
    assert value(metrics, "num_preemptions_total", model_name="tiny:kivi") == 9
    now["tiny"] = stats(kv_bytes_held=0, kv_bytes_capacity=200)
    assert value(metrics, "kv_bytes_held", model_name="tiny") == 0


def test_two_servers_in_one_process_count_apart(metrics):
    other = Metrics(["tiny"])
    metrics(record(finish_reasons=["stop"]))
    requests = "trimtab_requests_total"
    assert any(name == requests for name, _ in samples(metrics))
    assert not any(name == requests for name, _ in samples(other))
