"""Bytes that the KV cache really holds at one context length, and the bound that it never passes.

Every policy serves the same requests on the shipped model in a process of its own. `held` is the
allocator's count when a text has its full length (codes, scales, residual windows, unused ends of pages and
all); `most of all` is the most the whole engine held. The process's memory (RSS) is read as a check that does
not believe the allocator.

Then requests that grow: short prompts, long outputs, and a bound of a quarter of what they would hold
together (more where one alone needs more). Used and cached bytes are read after every step and must never
pass `kv_memory`; requests are preempted and recomputed instead, and their greedy tokens must be the same as
with room for all.

There are no GPU rows: the allocator and its count are the same on every device.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import torch
from _common import Claim, Table, arguments, begin, finish, positive, progress
from _contenders import greedy

import trimtab
from trimtab import Engine
from trimtab.engine.request import State
from trimtab.errors import RequestError
from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.tasks.speed import make_prompts
from trimtab.models.costs import kv_bytes_per_token
from trimtab.sizes import format_bytes

POLICIES = ["full", "kivi:bits=4", "kivi:bits=2", "streaming", "h2o", "snapkv"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--policies", nargs="*", default=POLICIES, help="besides `full`, which is always taken"
    )
    parser.add_argument("--context", type=positive, default=2048, help="tokens of each text at its end")
    parser.add_argument("--outputs", type=positive, default=64, help="how many of them are generated")
    parser.add_argument("--requests", type=positive, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="type of weights and of the full cache")
    parser.add_argument("--seed", type=int, default=0)
    options = begin(parser)
    if options.outputs >= options.context:
        parser.error(f"--outputs {options.outputs} must be less than --context {options.context}")

    records: dict[str, dict[str, Any]] = {}
    spawn = multiprocessing.get_context("spawn")
    for policy in dict.fromkeys(["full", *options.policies]):
        progress(f"{policy}: {options.requests} requests of {options.context} tokens")
        with spawn.Pool(1) as pool:  # a process of its own, so that its RSS is this policy's alone
            records[policy] = pool.apply(measure, (policy, options))
    report(records, options)


def measure(policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one policy holds with room for everything, and how it keeps a bound."""
    torch.set_num_threads(options.threads)
    model = trimtab.load(dtype=options.dtype)
    assert model.tokenizer is not None
    o, rng = options, random.Random(options.seed)
    long = make_prompts(model.tokenizer, shipped_text(), rng, o.requests, o.context - o.outputs)
    start = grow = o.context // 8
    short = make_prompts(model.tokenizer, shipped_text(), rng, o.requests, start)
    room = 2 * o.requests * (o.context + 512) * kv_bytes_per_token(model.config, model.dtype.itemsize)

    def engine(memory: int) -> Engine:
        return Engine(model, cache=policy, threads=o.threads, max_batch=o.requests, kv_memory=memory)

    whole = drive(engine(room), long, o.outputs)
    roomy = drive(engine(room), short, grow)
    bound = roomy["peak"] // 4
    tight = None
    while tight is None:
        try:
            tight = drive(engine(bound), short, grow)
        except TooSmall:  # not even one of them fits into a quarter
            bound += bound // 4
    same = sum(a == b for a, b in zip(tight.pop("tokens"), roomy.pop("tokens"), strict=True))
    del whole["tokens"]
    for later in (roomy, tight):  # an engine after the first reuses memory: its growth says nothing
        del later["rss_growth"]
    return {**whole, "bounded": {**tight, "kv_memory": bound, "wanted": roomy["peak"], "same_tokens": same}}


class TooSmall(Exception):
    """One request alone needs more than `kv_memory`."""


def drive(engine: Engine, prompts: list[list[int]], outputs: int) -> dict[str, Any]:
    """Serve all prompts, reading the allocator after every step."""
    # Sizes every buffer that a step needs, so that what grows afterwards is the cache.
    try:
        engine.generate(prompts[0][: engine.plan.max_step_tokens], greedy(1))
    except RequestError as error:
        raise TooSmall(str(error)) from None
    engine.reset_stats()
    before = rss()
    requests = [request for prompt in prompts for request in engine.submit(prompt, greedy(outputs))]
    most = 0
    while any(request.state is not State.FINISHED for request in requests):
        engine.step()
        stats = engine.stats()
        most = max(most, stats.kv_bytes_held + stats.kv_bytes_cached)
    for request in requests:
        if request.error:
            raise TooSmall(request.error)
    stats = engine.stats()
    return {
        "held_per_text": max(r.metrics.kv_bytes_held for r in requests),
        "peak_per_text": max(r.metrics.kv_bytes_peak for r in requests),
        "peak": max(most, stats.kv_bytes_peak),
        "capacity": stats.kv_bytes_capacity,
        "preemptions": stats.preemptions,
        "rss_growth": None if before is None else (rss() or 0) - before,
        "tokens": [r.output_ids for r in requests],
    }


def rss() -> int | None:
    """Bytes of memory this process has in use."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def report(records: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    full = records["full"]
    held = Table(
        f"{options.requests} texts of {options.context} tokens, {options.dtype}",
        ["policy", "held by a text", "of full", "most of a text", "most of all", "RSS growth"],
    )
    bounded = Table(
        f"{options.requests} texts of {options.context // 4} tokens with too little memory",
        ["policy", "would hold", "kv_memory", "most used + cached", "preemptions", "same tokens"],
    )
    claims = []
    for policy, record in records.items():
        share = record["held_per_text"] / full["held_per_text"]
        record["share_of_full"] = share
        held.add(
            policy,
            format_bytes(record["held_per_text"]),
            f"{share:.3f}x",
            format_bytes(record["peak_per_text"]),
            format_bytes(record["peak"]),
            _size(record["rss_growth"]),
        )
        tight = record["bounded"]
        bounded.add(
            policy,
            format_bytes(tight["wanted"]),
            format_bytes(tight["kv_memory"]),
            format_bytes(tight["peak"]),
            str(tight["preemptions"]),
            f"{tight['same_tokens']} of {options.requests}",
        )
        if (
            policy == "kivi:bits=2" and options.context >= 2048
        ):  # its unpacked window weighs more in short texts
            claims.append(Claim("kivi:bits=2, bytes held over full's", share, 0.25, at_most=True))
    for policy, record in records.items():
        tight = record["bounded"]
        used = tight["peak"] / tight["kv_memory"]
        claims.append(Claim(f"{policy}, most bytes over kv_memory", used, 1.0, at_most=True))
    finish("kvmemory", [held, bounded], claims, {"results": records}, options, options.seed)


def _size(value: int | None) -> str:
    return "unknown" if value is None else format_bytes(value)


if __name__ == "__main__":
    main()
