"""One stream, greedy: tokens per second of trimtab, transformers and llama.cpp, and what memory would allow.

The shipped model in each type, then random Llama shapes in bfloat16, then (where there is a GPU) a random
8B shape on it. All contenders decode the same weights from the same prompt, end to end, prompt included,
and take turns in one process. The ceiling is the bytes that one token has to read (weights of all
products, and the cache) at the read bandwidth measured between the turns with the same threads: main
memory's for the random shapes, and for the shipped model, which fits the processor's cache, that of a
buffer of its own size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _common import (
    Claim,
    ReadProbe,
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
    token_seconds,
)
from _contenders import Transformers, llama_cpp, run_ours
from _profile import Profile

import trimtab
from trimtab import Engine, Model
from trimtab.models.costs import kv_bytes_per_token, matmul_parameters
from trimtab.models.shapes import random_model, shape

TEXT = "Once upon a time there was a little princess who lived in a castle by the sea, and every evening "


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=positive, default=256, help="tokens per run of the shipped model")
    parser.add_argument("--shapes", nargs="*", default=["125m", "500m"], help="random shapes, bfloat16")
    parser.add_argument("--shape-tokens", type=positive, default=48, help="tokens per run of a random shape")
    parser.add_argument("--shape-rounds", type=positive, default=3)
    parser.add_argument("--profile", action="store_true", help="also show where our step's time goes")
    parser.add_argument("--gpu-shape", default="8b", help="random shape for the GPU rows")
    options = begin(parser)

    bench = Decode(options)
    for dtype in options.dtypes:
        model = trimtab.load(dtype=dtype)
        assert model.tokenizer is not None
        prompt = model.tokenizer.encode(TEXT)
        bench.one(f"shipped {dtype}", model, prompt, options.tokens, options.rounds, in_cache=True)
    for name in options.shapes:
        model = random_model(shape(name), "bfloat16")
        prompt = list(range(100, 132))
        bench.one(
            f"{name} bfloat16", model, prompt, options.shape_tokens, options.shape_rounds, in_cache=False
        )
        del model
    bench.gpu()
    bench.finish()


class Decode:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.table = Table(
            "One stream, greedy",
            [
                "model",
                "engine",
                "tokens/s",
                "us/token",
                "trimtab is faster",
                "GB/s",
                "ceiling GB/s",
                "of ceiling",
            ],
        )
        self.profiles: list[Table] = []
        self.records: dict[str, Any] = {}

    def one(
        self, title: str, model: Model, prompt: list[int], tokens: int, rounds: int, in_cache: bool
    ) -> None:
        """Measure one model with everyone there is, and add its rows."""
        progress(f"{title}: {tokens} tokens after {len(prompt)}")
        threads = self.options.threads
        # The same prompt comes again and again: without this, its prefix would be computed only once.
        engine = Engine(model, threads=threads, prefix_caching=False)
        item = model.dtype.itemsize
        context = len(prompt) + tokens / 2
        step_bytes = matmul_parameters(model.config) * item + context * kv_bytes_per_token(model.config, item)
        probe = ReadProbe(threads, round(step_bytes) if in_cache else None, model.device)

        def ours() -> Sample:
            probe.ask()
            return run_ours(engine, [prompt], [tokens])

        contenders: dict[str, Callable[[], Sample]] = {"trimtab": ours}
        absent: dict[str, str] = {}
        why = missing("transformers")
        if why is None:
            theirs = Transformers(model)
            contenders["transformers"] = lambda: theirs.run([prompt], [tokens])
            contenders["transformers, static cache"] = lambda: theirs.run([prompt], [tokens], "static")
        else:
            absent["transformers"] = why
        agreed = None
        with llama_cpp(model, prompt, tokens, threads) as llama:
            if isinstance(llama, str):
                absent["llama.cpp"] = llama
            else:
                contenders["llama.cpp"], agreed = llama
            samples = alternate(contenders, rounds)
        self._note(title, engine, samples, absent, step_bytes, probe, agreed)
        if self.options.profile:
            self._profile(title, engine, prompt, tokens, step_bytes, probe.typical)

    def _note(
        self,
        title: str,
        engine: Engine,
        samples: dict[str, list[Sample]],
        absent: dict[str, str],
        step_bytes: float,
        probe: ReadProbe,
        agreed: dict[str, float] | None,
    ) -> None:
        record: dict[str, Any] = {
            "backend": engine.backend,
            "bytes_per_token": step_bytes,
            "ceiling_gb_s": probe.typical,
            "ceiling_tokens_s": probe.typical * 1e9 / step_bytes,
            "llama_agreement": agreed,
            "engines": {},
        }
        for name, taken in samples.items():
            seconds = token_seconds(taken) or 1 / rate(taken)
            speed = step_bytes / seconds / 1e9
            faster = None if name == "trimtab" else ratio(samples["trimtab"], taken)
            record["engines"][name] = {
                "tokens_s": rate(taken),
                "rounds": [s.rate for s in taken],
                "token_us": seconds * 1e6,
                "gb_s": speed,
                "share_of_ceiling": speed / probe.typical,
                "trimtab_faster": faster,
            }
            self.table.add(
                title,
                f"trimtab ({engine.backend})" if name == "trimtab" else name,
                f"{rate(taken):.1f}",
                f"{seconds * 1e6:.0f}",
                ratio_text(faster),
                f"{speed:.1f}",
                f"{probe.typical:.1f}",
                f"{speed / probe.typical:.0%}",
            )
        for name, why in absent.items():
            record["engines"][name] = None
            self.table.add(title, name, why, "-", "-", "-", f"{probe.typical:.1f}", "-")
        self.records[title] = record

    def _profile(
        self, title: str, engine: Engine, prompt: list[int], tokens: int, step_bytes: float, ceiling: float
    ) -> None:
        with Profile(engine) as profile:
            run_ours(engine, [prompt], [tokens])
        floor = step_bytes / ceiling / 1e3
        self.profiles.append(
            profile.table(f"{title}: our step; reading its bytes alone would take {floor:.1f} us")
        )
        self.records[title]["profile_us"] = profile.record()

    def gpu(self) -> None:
        """The rows of a random shape on a GPU, where there is one."""
        o = self.options
        if not torch.cuda.is_available():
            self.table.add(f"{o.gpu_shape} bfloat16, GPU", "-", "no GPU", *["-"] * 5)
            self.records["gpu"] = None
            return
        model = random_model(shape(o.gpu_shape), "bfloat16", device="cuda")
        self.one("gpu", model, list(range(100, 132)), o.tokens, o.shape_rounds, in_cache=False)

    def claims(self) -> list[Claim]:
        found = []
        for title, record in self.records.items():
            if title == "gpu":
                continue
            shipped = title.startswith("shipped")
            found.append(_faster_claim(title, record, "transformers", 3.0 if shipped else 1.0))
            if shipped:
                found.append(_faster_claim(title, record, "llama.cpp", 1.0))
            else:
                share = record["engines"]["trimtab"]["share_of_ceiling"]
                found.append(Claim(f"{title}, share of read bandwidth", share, 0.75))
        gpu = self.records["gpu"]
        share = gpu["engines"]["trimtab"]["share_of_ceiling"] if gpu else None
        found.append(Claim("8B shape on a GPU, share of read bandwidth", share, 0.80, why="no GPU"))
        return found

    def finish(self) -> None:
        finish("decode", [self.table, *self.profiles], self.claims(), {"results": self.records}, self.options)


def _faster_claim(title: str, record: dict[str, Any], other: str, target: float) -> Claim:
    """How many times as fast as the other's fastest setting."""
    found = [engine for name, engine in record["engines"].items() if engine and name.startswith(other)]
    value = min((engine["trimtab_faster"]["median"] for engine in found), default=None)
    return Claim(f"{title}, times {other}", value, target, why=f"{other} is not here")


if __name__ == "__main__":
    main()
