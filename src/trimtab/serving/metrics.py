"""`/metrics` for Prometheus: counters and histograms of requests, gauges of the engines.

Names follow vLLM's with the prefix `trimtab_`, so that a dashboard needs little more than another prefix.
Requests are counted when they end; the engines are asked when Prometheus asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

import trimtab

if TYPE_CHECKING:
    from trimtab.serving.observe import RequestRecord
    from trimtab.serving.worker import Worker, WorkerStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
UNKNOWN = "unknown"  # the model of a request that named none of ours: a client must not invent time series

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)

_Reading = Callable[["WorkerStats"], float]
_GAUGES: dict[str, tuple[str, _Reading]] = {
    "num_requests_running": ("Completions being computed.", lambda s: s.running),
    "num_requests_waiting": ("Completions waiting to be started.", lambda s: s.waiting),
    "kv_bytes_held": ("KV-cache bytes that running completions hold.", lambda s: s.engine.kv_bytes_held),
    "kv_bytes_cached": ("KV-cache bytes kept for prompts to come.", lambda s: s.engine.kv_bytes_cached),
    "kv_bytes_peak": ("Most KV-cache bytes held at once so far.", lambda s: s.engine.kv_bytes_peak),
    "kv_bytes_capacity": ("KV-cache bytes there are.", lambda s: s.engine.kv_bytes_capacity),
    "kv_bytes_host": ("KV-cache bytes held in host memory.", lambda s: s.engine.kv_bytes_host),
    "kv_cache_usage_ratio": (
        "KV-cache bytes held, of those there are.",
        lambda s: s.engine.kv_bytes_held / max(s.engine.kv_bytes_capacity, 1),
    ),
}
_COUNTERS: dict[str, tuple[str, _Reading]] = {
    "num_preemptions": ("Completions put back for want of memory.", lambda s: s.engine.preemptions),
    "prefix_cache_hit_tokens": (
        "Prompt tokens taken over instead of computed.",
        lambda s: s.engine.prefix_hit_tokens,
    ),
    "engine_steps": ("Steps of the engine.", lambda s: s.engine.steps),
    "engine_tokens": ("Tokens the engine has computed, prompts included.", lambda s: s.engine.tokens),
}


class Metrics:
    """The meters of one server, in a registry of their own.

    Args:
        names: the served names, known before the model is loaded.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._worker: Worker | None = None
        self._registry = CollectorRegistry()
        one, by = self._registry, ("model_name",)
        self._requests = Counter(
            "trimtab_requests",
            "HTTP requests answered.",
            ("model_name", "route", "status"),
            registry=one,
        )
        self._finished = Counter(
            "trimtab_request_success",
            "Completions that ended, by what ended them.",
            ("model_name", "finished_reason"),
            registry=one,
        )
        self._prompt_tokens = Counter("trimtab_prompt_tokens", "Prompt tokens taken in.", by, registry=one)
        self._tokens = Counter("trimtab_generation_tokens", "Tokens generated.", by, registry=one)
        self._first = Histogram(
            "trimtab_time_to_first_token_seconds",
            "From arrival to the first token.",
            by,
            buckets=_FAST,
            registry=one,
        )
        self._between = Histogram(
            "trimtab_inter_token_latency_seconds",
            "Between two tokens of a text.",
            by,
            buckets=_FAST,
            registry=one,
        )
        self._whole = Histogram(
            "trimtab_e2e_request_latency_seconds",
            "From arrival to the end of the answer.",
            by,
            buckets=_SLOW,
            registry=one,
        )
        self._queue = Histogram(
            "trimtab_request_queue_time_seconds",
            "From arrival to the first computing.",
            by,
            buckets=_FAST,
            registry=one,
        )
        one.register(self)
        # There from the start, at zero: the rate of a series misses what happened before it appeared.
        totals = (self._prompt_tokens, self._tokens, self._first, self._between, self._whole, self._queue)
        for meter in totals:
            for name in self._names:
                meter.labels(name)

    def watch(self, worker: Worker) -> None:
        """Show this worker's engines from now on."""
        self._worker = worker

    def __call__(self, record: RequestRecord) -> None:
        """Count a finished request."""
        name = record.model if record.model in self._names else UNKNOWN
        self._requests.labels(name, record.route, str(record.status)).inc()
        for reason in record.finish_reasons:
            self._finished.labels(name, reason or UNKNOWN).inc()
        self._prompt_tokens.labels(name).inc(record.prompt_tokens)
        self._tokens.labels(name).inc(record.completion_tokens)
        if record.ttft_s is not None:
            self._first.labels(name).observe(record.ttft_s)
        if record.queue_s is not None:
            self._queue.labels(name).observe(record.queue_s)
        if record.finish_reasons:  # an answer of 400 within a millisecond says nothing of the model
            self._whole.labels(name).observe(record.total_s)
        between = self._between.labels(name)
        for gap in record.inter_token_s:
            between.observe(gap)

    def text(self) -> bytes:
        """All meters in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    # --- what Prometheus' registry asks for

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask the engines."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The engines' meters as they are now."""
        info = GaugeMetricFamily("trimtab_info", "The version that runs.", labels=("version",))
        info.add_metric((trimtab.__version__,), 1)
        yield info
        worker = self._worker
        ready = GaugeMetricFamily("trimtab_ready", "1 while requests are taken.")
        ready.add_metric((), float(worker is not None and worker.ready))
        yield ready
        if worker is None:
            return
        stats = {name: worker.stats(name) for name in worker.names}
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for short, (help, reading) in table.items():
                family = kind(f"trimtab_{short}", help, labels=("model_name",))
                for name, found in stats.items():
                    family.add_metric((name,), reading(found))
                yield family
