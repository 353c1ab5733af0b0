"""Endless generation: whether speed, memory or perplexity drift over 100,000 tokens of one text.

The shipped model (context 2,048) goes on far beyond its context under `streaming`.

Written: one text is sampled without end; each part's seconds a token, bytes held, and the perplexity of what
was sampled. Read: real text is scored as one stream; each part's perplexity is set against the same part read
with a fresh cache (from `--lead` tokens before it), so that harder passages do not look like drift. A cache
without an end has no drift if every ratio stays near 1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

from _common import Claim, Table, arguments, begin, finish, positive, progress

import trimtab
from trimtab import Engine, SamplingParams
from trimtab.engine.request import State
from trimtab.evaluation.corpus import shipped_text
from trimtab.sizes import format_bytes


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--policy", default="streaming", help="an endless cache policy")
    parser.add_argument("--tokens", type=positive, default=100_000)
    parser.add_argument("--parts", type=positive, default=10)
    parser.add_argument(
        "--lead", type=positive, default=1024, help="tokens read before a part is read afresh"
    )
    parser.add_argument("--dtype", default="bfloat16")
    options = begin(parser)
    model = trimtab.load(dtype=options.dtype)
    assert model.tokenizer is not None
    size = options.tokens // options.parts
    ids = model.tokenizer.encode(shipped_text())

    def engine() -> Engine:
        return Engine(model, cache=options.policy, threads=options.threads, max_batch=2, kv_memory="64MiB")

    progress(f"writing {options.tokens} tokens")
    written = write(engine(), ids[:256], size, options.parts)
    progress(f"reading {options.tokens} tokens")
    read = stream(engine(), ids * math.ceil((options.tokens + options.lead) / len(ids)), size, options)

    table = Table(
        f"{options.policy}, parts of {size} tokens of one text",
        ["tokens", "ms a token", "held", "perplexity of its own text", "of real text", "over a fresh cache"],
    )
    for i, (made, scored) in enumerate(zip(written, read, strict=True)):
        table.add(
            f"{(i + 1) * size}",
            f"{made['ms_a_token']:.3f}",
            format_bytes(made["held"]),
            f"{made['perplexity']:.2f}",
            f"{scored['perplexity']:.2f}",
            f"{scored['over_fresh']:.4f}",
        )
    half = options.parts // 2 or 1
    speeds, own = [m["ms_a_token"] for m in written], [math.log(m["perplexity"]) for m in written]
    claims = [
        Claim("time a token, second half over first", late(speeds, half), 1.1, at_most=True),
        Claim(
            "most bytes held over least", max(m["held"] for m in written) / least(written), 1.0, at_most=True
        ),
        Claim(
            "real text, worst part over a fresh cache", max(r["over_fresh"] for r in read), 1.02, at_most=True
        ),
        Claim("loss on its own text, second half over first", late(own, half), 1.1, at_most=True),
    ]
    finish("streaming", [table], claims, {"written": written, "read": read}, options)


def late(values: Sequence[float], half: int) -> float:
    return statistics.median(values[half:] or values) / statistics.median(values[:half])


def least(written: list[dict[str, float]]) -> float:
    return min(m["held"] for m in written)


def write(engine: Engine, prompt: list[int], size: int, parts: int) -> list[dict[str, float]]:
    """Sample one text of `parts` times `size` tokens."""
    params = SamplingParams(max_tokens=size * parts, temperature=1.0, seed=1, ignore_eos=True, logprobs=0)
    [request] = engine.submit(prompt, params)
    while request.computed < len(prompt):
        engine.step()
    found: list[dict[str, float]] = []
    while request.state is not State.FINISHED:
        before, begun, most = len(request.output_ids), time.perf_counter(), 0
        while request.state is not State.FINISHED and len(request.output_ids) < before + size:
            engine.step()
            # Pages come and go by sixteen; the most in use says what a part needs.
            most = max(most, engine.cache.bytes_held)
        count = len(request.output_ids) - before
        losses = [-x.logprob for x in (request.logprobs or [])[before:]]
        found.append(
            {
                "ms_a_token": (time.perf_counter() - begun) / count * 1e3,
                "held": most,
                "perplexity": math.exp(math.fsum(losses) / len(losses)),
            }
        )
    return found[:parts]


def stream(engine: Engine, ids: list[int], size: int, options) -> list[dict[str, float]]:
    """Perplexity of each part of one long stream, and over the same part read with a fresh cache."""
    lead = options.lead
    end = lead + size * options.parts
    [whole] = engine.score([(ids[:lead], ids[lead:end])])
    found = []
    for i in range(options.parts):
        start = lead + i * size
        [fresh] = engine.score([(ids[start - lead : start], ids[start : start + size])])
        loss = -math.fsum(whole.logprobs[i * size : (i + 1) * size]) / size
        again = -math.fsum(fresh.logprobs) / size
        found.append({"perplexity": math.exp(loss), "over_fresh": math.exp(loss - again)})
    return found


if __name__ == "__main__":
    main()
