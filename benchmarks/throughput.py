"""Many requests at once: useful tokens per second of trimtab and of transformers' batched generate.

The requests have prompts and outputs of mixed length, drawn once from a fixed seed: real text in, a fixed
number of greedy tokens out. Useful tokens are those that were asked for. transformers gets all requests as
one left-padded batch, so it computes padding, and texts that are done wait for the longest; trimtab batches
continuously. Both decode the same weights and take turns in one process.

The ceiling is arithmetic: all operations of prompts and outputs, at the rate at which torch multiplies
large matrices of that type with the same threads.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
from _common import (
    Claim,
    Sample,
    Table,
    alternate,
    arguments,
    begin,
    finish,
    missing,
    positive,
    progress,
    rate,
    ratio,
    ratio_text,
)
from _contenders import Transformers, run_ours
from _profile import Profile

import trimtab
from trimtab import Engine, Model, hardware
from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.tasks.speed import make_prompts
from trimtab.models.config import ModelConfig
from trimtab.models.costs import decode_flops, prefill_flops
from trimtab.models.shapes import random_model, shape

Requests = tuple[list[list[int]], list[int]]  # prompts, and how many tokens each wants


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--requests", type=positive, default=32)
    parser.add_argument(
        "--batches", nargs="*", type=positive, default=[8, 16, 32], help="max_batch of trimtab"
    )
    parser.add_argument("--prompts", nargs=2, type=positive, default=[16, 512], metavar=("LEAST", "MOST"))
    parser.add_argument("--outputs", nargs=2, type=positive, default=[16, 256], metavar=("LEAST", "MOST"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="also show where our steps' time goes")
    parser.add_argument("--gpu-shape", default="8b", help="random shape for the GPU rows")
    parser.add_argument("--gpu-requests", type=positive, default=256)
    options = begin(parser)

    bench = Throughput(options)
    for dtype in options.dtypes:
        model = trimtab.load(dtype=dtype)
        bench.one(f"shipped {dtype}", model, bench.requests(model, options.requests), options.batches)
    bench.gpu()
    bench.finish()


class Throughput:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.table = Table(
            "Requests of mixed length, greedy",
            [
                "model",
                "engine",
                "useful tokens/s",
                "trimtab is faster",
                "GFLOP/s",
                "ceiling GFLOP/s",
                "of ceiling",
            ],
        )
        self.profiles: list[Table] = []
        self.records: dict[str, Any] = {}

    def requests(self, model: Model, count: int) -> Requests:
        """Prompts of real text (of drawn ids where there is no tokenizer) and output lengths, both mixed."""
        o = self.options
        rng = random.Random(o.seed)
        lengths = [rng.randint(*o.prompts) for _ in range(count)]
        counts = [rng.randint(*o.outputs) for _ in range(count)]
        if model.tokenizer is None:
            whole = [[rng.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]
        else:
            whole = make_prompts(model.tokenizer, shipped_text(), rng, count, max(lengths))
        return [prompt[:n] for prompt, n in zip(whole, lengths, strict=True)], counts

    def one(self, title: str, model: Model, requests: Requests, batches: list[int]) -> None:
        """Measure one model with both libraries, and add its rows."""
        prompts, counts = requests
        progress(f"{title}: {len(prompts)} requests, {sum(map(len, prompts))} tokens in, {sum(counts)} out")
        engines = {
            f"trimtab, max_batch={size}": Engine(
                # The same prompts come again every round: none may be found in the prefix cache.
                model,
                threads=self.options.threads,
                max_batch=size,
                prefix_caching=False,
            )
            for size in batches
        }
        contenders: dict[str, Callable[[], Sample]] = {
            name: (lambda engine=engine: run_ours(engine, prompts, counts))
            for name, engine in engines.items()
        }
        why = missing("transformers")
        if why is None:
            theirs = Transformers(model)
            contenders["transformers"] = lambda: theirs.run(prompts, counts)
        samples = alternate(contenders, self.options.rounds)
        if model.device.type == "cpu":
            dtype = str(model.dtype).removeprefix("torch.")
            ceiling = hardware.matmul_rate(dtype, self.options.threads)
        else:
            ceiling = None
        flops = total_flops(model.config, prompts, counts)
        self._note(title, samples, why, flops, ceiling)
        self.records[title]["backend"] = next(iter(engines.values())).backend
        if self.options.profile:
            for name, engine in engines.items():
                self._profile(f"{title}, {name}", engine, requests)

    def _note(
        self,
        title: str,
        samples: dict[str, list[Sample]],
        absent: str | None,
        flops: int,
        ceiling: float | None,
    ) -> None:
        useful = next(iter(samples.values()))[0].tokens
        record: dict[str, Any] = {
            "useful_tokens": useful,
            "flops": flops,
            "ceiling_gflop_s": ceiling,
            "ceiling_tokens_s": ceiling * 1e9 * useful / flops if ceiling else None,
            "engines": {},
        }
        theirs = samples.get("transformers")
        for name, taken in samples.items():
            speed = rate(taken)
            gflops = speed / useful * flops / 1e9
            faster = ratio(taken, theirs) if theirs and name != "transformers" else None
            record["engines"][name] = {
                "tokens_s": speed,
                "rounds": [s.rate for s in taken],
                "gflop_s": gflops,
                "share_of_ceiling": gflops / ceiling if ceiling else None,
                "faster_than_transformers": faster,
            }
            self.table.add(
                title,
                name,
                f"{speed:.0f}",
                ratio_text(faster),
                f"{gflops:.1f}",
                f"{ceiling:.1f}" if ceiling else "-",
                f"{gflops / ceiling:.0%}" if ceiling else "-",
            )
        if absent is not None:
            record["engines"]["transformers"] = None
            self.table.add(title, "transformers", absent, *["-"] * 4)
        self.records[title] = record

    def _profile(self, title: str, engine: Engine, requests: Requests) -> None:
        engine.reset_stats()
        with Profile(engine) as profile:
            run_ours(engine, *requests)
        stats = engine.stats()
        rows = stats.tokens / stats.steps
        self.profiles.append(profile.table(f"{title}: our step; {stats.steps} steps of {rows:.1f} rows"))
        self.records[title.split(",")[0]].setdefault("profile_us", {})[title] = profile.record()

    def gpu(self) -> None:
        """The rows of a random shape on a GPU, where there is one."""
        o = self.options
        if not torch.cuda.is_available():
            self.table.add(f"{o.gpu_shape} bfloat16, GPU", "-", "no GPU", *["-"] * 4)
            self.records["gpu"] = None
            return
        model = random_model(shape(o.gpu_shape), "bfloat16", device="cuda")
        self.one("gpu", model, self.requests(model, o.gpu_requests), [o.gpu_requests])

    def claims(self) -> list[Claim]:
        found = []
        for title, record in self.records.items():
            if record is None:
                continue
            ratios = [e["faster_than_transformers"] for e in record["engines"].values() if e]
            value = max((r["median"] for r in ratios if r), default=None)
            target = 2.5 if title != "gpu" else 1.0
            found.append(Claim(f"{title}, times transformers", value, target, why="transformers is not here"))
        return found

    def finish(self) -> None:
        tables = [self.table, *self.profiles]
        finish(
            "throughput", tables, self.claims(), {"results": self.records}, self.options, self.options.seed
        )


def total_flops(config: ModelConfig, prompts: list[list[int]], counts: list[int]) -> int:
    """Operations that the requests need, padding and recomputation left out."""
    total = 0
    for prompt, count in zip(prompts, counts, strict=True):
        # The prompt's logits give the first token; every further one is a decode step.
        total += prefill_flops(config, len(prompt))
        total += sum(decode_flops(config, len(prompt) + i) for i in range(1, count))
    return total


if __name__ == "__main__":
    main()
