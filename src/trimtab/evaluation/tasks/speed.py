"""Speed and memory of serving: time to first token, time per token, throughput, bytes.

Each round sends `concurrency` requests at once, all with prompts of equal length from real text and a fixed
number of greedy tokens. No two prompts of a run begin alike, so nothing is ever found in the prefix
cache. `compare` lets its plans take turns round by round, so that a machine that slows down
slows all of them; medians over rounds are reported.

A model without a tokenizer gets prompts of drawn token ids.

Not covered: requests that arrive over time, mixed lengths, and the network.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError
from trimtab.evaluation.corpus import load_text
from trimtab.evaluation.memory import held_metrics
from trimtab.evaluation.statistics import median, quantile
from trimtab.evaluation.tasks.base import AlternatingTask, Metric, TaskContext, TaskResult
from trimtab.registry import TASKS, Card

if TYPE_CHECKING:
    from trimtab.engine.engine import Engine
    from trimtab.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """Settings of `speed`.

    prompt: tokens per prompt.
    tokens: tokens generated per request.
    concurrency: numbers of requests sent at once, e.g. `1+8`.
    rounds: how often each is measured.
    text, folder: where the prompts come from, as for `perplexity`.
    """

    prompt: int = 512
    tokens: int = 64
    concurrency: tuple[int, ...] = (1, 8)
    rounds: int = 3
    text: str = "shipped"
    folder: str = "data"

    def __post_init__(self) -> None:
        for name, least in (("prompt", 2), ("tokens", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"option {name!r} of task 'speed' is {getattr(self, name)}; it must be at least {least}"
                )
        twice = len(set(self.concurrency)) < len(self.concurrency)
        if not self.concurrency or min(self.concurrency) < 1 or twice:
            raise ConfigError(
                f"option 'concurrency' of task 'speed' is {'+'.join(map(str, self.concurrency))!r}; write "
                "different whole numbers of at least 1, e.g. 1+8"
            )


@dataclass(frozen=True, slots=True)
class Sample:
    """What one round saw at one concurrency. Times in seconds, one entry a request or a gap."""

    wall_s: float
    tokens: int
    ttft_s: list[float]
    gaps_s: list[float]
    kv_bytes_held: list[int]
    kv_bytes_peak: int
    prefix_hit_tokens: int


Round = dict[int, Sample]


@TASKS.add(
    options=SpeedOptions,
    card=Card(
        title="Speed and memory",
        idea="Requests with prompts of equal length are sent at once, and every token's arrival is timed: "
        "time to first token (TTFT), time per further token (median and 95th percentile), tokens of all "
        "requests per second, and bytes of cache. Beside the speed of one stream stands what the memory "
        "would allow: weights and cache read once per token, at the measured read bandwidth for that many "
        "bytes.",
        exactness="Wall-clock times after a warm-up; plans take turns round by round, and medians are "
        "reported. Bytes are metered by the cache, not estimated. Prompts never repeat, so the prefix "
        "cache does not help.",
        cost="rounds x sum of concurrency requests of prompt + tokens tokens, and a warm-up.",
        needs="A machine that does nothing else: look at ratios between plans first.",
        avoid_when="You want to know about your own traffic: lengths and arrival times change everything.",
    ),
)
class Speed(AlternatingTask):
    options: SpeedOptions

    @property
    def rounds(self) -> int:
        return self.options.rounds

    def warm_up(self, engine: Engine, ctx: TaskContext) -> None:
        o, limit = self.options, engine.model.config.context_length
        if o.prompt + o.tokens > limit:
            raise ConfigError(
                f"task 'speed' wants prompt={o.prompt} + tokens={o.tokens} tokens, but the model's context "
                f"is {limit}; make prompt smaller"
            )
        for concurrency in o.concurrency:
            self._send(engine, ctx, concurrency, "warm-up", tokens=min(8, o.tokens))

    def measure(self, engine: Engine, ctx: TaskContext, index: int) -> Round:
        o = self.options
        return {c: self._send(engine, ctx, c, f"round {index}", o.tokens) for c in o.concurrency}

    def _send(self, engine: Engine, ctx: TaskContext, concurrency: int, key: str, tokens: int) -> Sample:
        from trimtab.decoding.sampling_params import SamplingParams

        o = self.options
        rng = random.Random(f"speed {ctx.seed} {key} {concurrency}")
        tokenizer = engine.model.tokenizer
        if tokenizer is None or not tokenizer.available:
            vocabulary = range(engine.model.config.vocab_size)
            prompts = [rng.choices(vocabulary, k=o.prompt) for _ in range(concurrency)]
        else:
            text = load_text(o.text, o.folder)
            prompts = make_prompts(tokenizer, text, rng, concurrency, o.prompt)
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        engine.reset_stats()
        start = time.perf_counter()
        outs = engine.generate(prompts, params)
        wall = time.perf_counter() - start
        stats = engine.stats()
        gaps = [
            later - earlier
            for out in outs
            for earlier, later in zip(out.metrics.token_times, out.metrics.token_times[1:], strict=False)
        ]
        return Sample(
            wall_s=wall,
            tokens=sum(out.metrics.completion_tokens for out in outs),
            ttft_s=[out.metrics.token_times[0] for out in outs],
            gaps_s=gaps,
            kv_bytes_held=[out.metrics.kv_bytes_held for out in outs],
            kv_bytes_peak=stats.kv_bytes_peak,
            prefix_hit_tokens=stats.prefix_hit_tokens,
        )

    def summarise(self, engine: Engine, ctx: TaskContext, samples: list[Round]) -> TaskResult:
        o = self.options
        metrics: dict[str, Metric] = {}
        for c in o.concurrency:
            metrics |= _at(c, [s[c] for s in samples], o.concurrency)
        held = [b for s in samples for sample in s.values() for b in sample.kv_bytes_held]
        metrics |= held_metrics(engine.model.config, [o.prompt + o.tokens] * len(held), held)
        if 1 in o.concurrency:
            metrics |= bandwidth_metrics(engine, metrics["time_per_token_p50_1"].value, held)
        hits = sum(sample.prefix_hit_tokens for s in samples for sample in s.values())
        notes = (f"{hits} prompt tokens came from the prefix cache; TTFT is too good",) if hits else ()
        return TaskResult(metrics, {"rounds": [_plain(s) for s in samples]}, notes)


def _at(concurrency: int, samples: Sequence[Sample], all_of_them: Sequence[int]) -> dict[str, Metric]:
    """Metrics at one concurrency; latency is shown for the lowest, the pictures take the highest."""
    c = concurrency
    gaps = [g for s in samples for g in s.gaps_s]
    first = [t for s in samples for t in s.ttft_s]
    rates = [s.tokens / s.wall_s for s in samples]
    times = "" if c == 1 else f" ×{c}"
    latency = ("TTFT" + times, "per token" + times) if c == min(all_of_them) else ("", "")
    return {
        f"ttft_{c}": Metric(median(first), "s", "lower", n=len(first), label=latency[0]),
        f"time_per_token_p50_{c}": Metric(median(gaps), "s", "lower", n=len(gaps), label=latency[1]),
        f"time_per_token_p95_{c}": Metric(quantile(gaps, 0.95), "s", "lower", n=len(gaps)),
        f"throughput_{c}": Metric(
            median(rates),
            "tok/s",
            "higher",
            n=len(rates),
            label=f"tok/s ×{c}",
            title=f"tokens per second, {c} request{'s' if c > 1 else ''} at once",
            axis="speed" if c == max(all_of_them) else None,
        ),
        f"kv_bytes_peak_{c}": Metric(max(s.kv_bytes_peak for s in samples), "B", "lower", n=len(samples)),
    }


def bandwidth_metrics(
    engine: Engine, seconds_per_token: float | None, held: Sequence[int]
) -> dict[str, Metric]:
    """Bytes one stream reads per token, over the time that takes, beside the measured ceiling.

    Every weight that a token is multiplied with is read once, and the cache once. Null where the ceiling
    is not measured (anything but the CPU).
    """
    from trimtab.hardware import read_bandwidth

    weight = next(engine.model.parameters())
    weights = engine.runner.model.matmul_bytes(active_only=True)
    step_bytes = weights + median(held)
    rate = step_bytes / seconds_per_token / 1e9 if seconds_per_token else None
    ceiling = None
    if weight.device.type == "cpu":
        ceiling = read_bandwidth(engine.threads, round(step_bytes))
    share = rate / ceiling if rate is not None and ceiling is not None else None
    return {
        "step_bytes": Metric(step_bytes, "B"),
        "bandwidth": Metric(rate, "GB/s", "higher"),
        "bandwidth_ceiling": Metric(ceiling, "GB/s"),
        "bandwidth_share": Metric(share, "share", "higher", label="of bandwidth"),
    }


def make_prompts(
    tokenizer: Tokenizer, text: str, rng: random.Random, count: int, length: int
) -> list[list[int]]:
    """`count` prompts of `length` tokens from drawn places of `text`."""
    ids = _ids(tokenizer, text)
    if len(ids) < length + count:
        raise ConfigError(
            f"the text has only {len(ids)} tokens, too few for {count} different prompts of {length} tokens; "
            "name a longer text or make prompt smaller"
        )
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    starts = rng.sample(range(len(ids) - length), count)
    return [(first + ids[s : s + length])[:length] for s in starts]


@lru_cache(maxsize=4)
def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _plain(sampled: Round) -> dict[str, dict[str, float]]:
    return {
        str(c): {"wall_s": s.wall_s, "ttft_s": median(s.ttft_s), "time_per_token_s": median(s.gaps_s)}
        for c, s in sampled.items()
    }
