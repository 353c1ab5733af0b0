"""What the shipped models do on a CPU: time to the first token, prompt and generated tokens per second.

Formats take turns: float32, bfloat16, and int8 weights (norms and cache rows are bfloat16 then). GEB-1.3B
(arXiv 2406.09900) tells such figures of itself, about 12 tokens/s in float32; `--shapes 1b` is of that size.
The ceiling of decoding is the bytes that one token has to read (weights of all products, and the cache) at
the read bandwidth of a buffer of that size, measured between the turns with the same threads. Prompts are
bound by arithmetic and have no ceiling here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from _common import (
    ReadProbe,
    Sample,
    Table,
    alternate,
    arguments,
    begin,
    finish,
    positive,
    progress,
    ratio,
    ratio_text,
    token_seconds,
)
from _contenders import run_ours

import trimtab
from trimtab import Engine, Model
from trimtab.evaluation.corpus import shipped_text
from trimtab.models.costs import kv_bytes_per_token
from trimtab.models.hub import shipped_names
from trimtab.models.shapes import random_model, shape

FORMATS = {  # dtype, weights
    "float32": ("float32", "plain"),
    "bfloat16": ("bfloat16", "plain"),
    "int8": ("bfloat16", "int8"),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="*", default=shipped_names(), help="default: all that are shipped")
    parser.add_argument("--shapes", nargs="*", default=[], help="random shapes besides, e.g. 1b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--prompts", nargs="+", type=positive, default=[32, 512], help="prompt lengths")
    parser.add_argument("--tokens", type=positive, default=128, help="tokens decoded after the first prompt")
    options = begin(parser)

    bench = Geb(options)
    for name in options.models:
        bench.one(name, lambda dtype, name=name: trimtab.load(name, dtype=dtype))
    for name in options.shapes:
        bench.one(name, lambda dtype, name=name: random_model(shape(name), dtype))
    finish("geb", [bench.table], [], {"results": bench.records}, options)


class Geb:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        columns = ["model", "weights", "MB"]
        for length in options.prompts:
            columns += [f"first token after {length}, ms", "prompt tokens/s"]
        self.table = Table(
            "One request on a CPU",
            [*columns, "tokens/s", f"times {options.formats[0]}", "GB/s", "ceiling GB/s", "of ceiling"],
        )
        self.records: dict[str, dict[str, Any]] = {}

    def one(self, title: str, load: Callable[[str], Model]) -> None:
        """Measure one model in all formats, in turns, and add its rows."""
        o = self.options
        progress(f"{title}: prompts of {' and '.join(map(str, o.prompts))} tokens, {o.tokens} decoded")
        engines, probes, contenders = {}, {}, {}
        for name in o.formats:
            dtype, weights = FORMATS[name]
            # The same prompt comes again and again: without this, its prefix would be computed only once.
            engine = Engine(load(dtype), weights=weights, threads=o.threads, prefix_caching=False)
            engines[name] = engine
            probes[name] = ReadProbe(o.threads, round(self._step_bytes(engine)))
            for length in o.prompts:
                contenders[f"{name} first {length}"] = partial(self._first, engine, length)
            contenders[f"{name} decode"] = partial(self._decode, engine, probes[name])
        samples = alternate(contenders, o.rounds)
        for name, engine in engines.items():
            self._note(title, name, engine, probes[name], samples)

    def _step_bytes(self, engine: Engine) -> float:
        """Bytes that an average token of the decoding run reads."""
        model = engine.model
        context = self.options.prompts[0] + self.options.tokens / 2
        return model.matmul_bytes() + context * kv_bytes_per_token(model.config, model.dtype.itemsize)

    def _first(self, engine: Engine, length: int) -> Sample:
        """A prompt and the token after it, end to end; the sample counts the prompt's tokens."""
        return Sample(length, run_ours(engine, [prompt_of(engine.model, length)], [1]).seconds)

    def _decode(self, engine: Engine, probe: ReadProbe) -> Sample:
        probe.ask()
        return run_ours(engine, [prompt_of(engine.model, self.options.prompts[0])], [self.options.tokens])

    def _note(
        self, title: str, name: str, engine: Engine, probe: ReadProbe, samples: dict[str, list[Sample]]
    ) -> None:
        o = self.options
        decoded = samples[f"{name} decode"]
        seconds = token_seconds(decoded) or median(s.seconds for s in decoded)
        bandwidth = self._step_bytes(engine) / seconds / 1e9
        record: dict[str, Any] = {
            "backend": engine.backend,
            "weight_bytes": engine.model.weight_bytes(),
            "bytes_per_token": self._step_bytes(engine),
            "decode_tokens_s": 1 / seconds,
            "decode_rounds": [s.rate for s in decoded],
            "gb_s": bandwidth,
            "ceiling_gb_s": probe.typical,
            "share_of_ceiling": bandwidth / probe.typical,
            "first_token": {},
        }
        cells = [f"{record['weight_bytes'] / 1e6:.1f}"]
        for length in o.prompts:
            taken = [s.seconds for s in samples[f"{name} first {length}"]]
            record["first_token"][str(length)] = {
                "median_s": median(taken),
                "min_s": min(taken),
                "max_s": max(taken),
                "prompt_tokens_s": length / median(taken),
            }
            cells += [f"{median(taken) * 1e3:.2f}", f"{length / median(taken):.0f}"]
        faster = None if name == o.formats[0] else ratio(decoded, samples[f"{o.formats[0]} decode"])
        record[f"decode_times_{o.formats[0]}"] = faster
        cells += [f"{1 / seconds:.0f}", ratio_text(faster), f"{bandwidth:.1f}", f"{probe.typical:.1f}"]
        self.table.add(title, name, *cells, f"{bandwidth / probe.typical:.0%}")
        self.records.setdefault(title, {})[name] = record


def prompt_of(model: Model, length: int) -> list[int]:
    """The first `length` tokens of the shipped text, or any tokens for a model without a tokenizer."""
    if model.tokenizer is None:
        return list(range(100, 100 + length))
    return model.tokenizer.encode(shipped_text()[: 20 * length])[:length]


if __name__ == "__main__":
    main()
