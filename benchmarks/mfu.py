"""How much of a GPU training uses: model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B).

A Llama shape with random weights is trained by `trimtab train`'s loop in bfloat16 (autocast, float32 weights,
AdamW) on random tokens, with and without recomputing activations and torch.compile. Operations are those of
the model, recomputed ones not counted; the peak is the maker's figure for dense bfloat16 where the GPU is
known, and beside it that of a large product measured here. Without a GPU there is nothing to measure, and the
result is null; `--device cpu` with a small `--layers` and `--vocab` shows that the script works.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from typing import Any

import numpy as np
import torch
from _common import Claim, Table, arguments, begin, finish, positive, progress
from _trainers import our_trainer

from trimtab.models.shapes import random_model, shape
from trimtab.training.data.segments import Segment, all_trained
from trimtab.training.watching.speed import peak_flops, training_flops

# Dense bfloat16 operations a second, from the makers' data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
TARGET = 0.45
WARM_UPS = 2  # steps: memory is found, kernels are chosen, parts compiled


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--layers", type=positive, help="another number of layers")
    parser.add_argument("--vocab", type=positive, help="another size of the vocabulary")
    parser.add_argument("--context", type=positive, default=4096, help="tokens of a text")
    parser.add_argument("--micro-texts", type=positive, default=4, help="texts through the model at a time")
    parser.add_argument("--micro-batches", type=positive, default=4, help="of a step")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = begin(parser)
    table = Table(
        f"Training a {options.shape} shape, bfloat16, texts of {options.context}",
        [
            "compile",
            "recompute activations",
            "tokens/s",
            "TFLOP/s",
            "of maker's peak",
            "of measured",
            "GB",
        ],
    )
    if options.device == "cuda" and not torch.cuda.is_available():
        table.add("-", "-", "no GPU", "-", "-", "-", "-")
        found = None
    else:
        settings = itertools.product((False, True), repeat=2)
        found = [_row(options, table, compiled, again) for compiled, again in settings]
    shares = [row["mfu"] for row in found or () if row is not None and row["mfu"] is not None]
    why = "no GPU" if found is None else "no row ran on a GPU whose peak is known"
    claim = Claim(f"{options.shape} shape, best MFU", max(shares, default=None), TARGET, why=why)
    finish("mfu", [table], [claim], {"results": found}, options)


def _row(options: argparse.Namespace, table: Table, compiled: bool, again: bool) -> dict[str, Any] | None:
    """Measure one setting; None where memory does not hold it."""
    progress(f"compile {compiled}, recompute activations {again}")
    cells = ["yes" if setting else "no" for setting in (compiled, again)]
    try:
        record = _measure(options, compiled, again)
    except torch.cuda.OutOfMemoryError:
        table.add(*cells, "out of memory", "-", "-", "-", "-")
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    table.add(
        *cells,
        f"{record['tokens_s']:.0f}",
        f"{record['flops_s'] / 1e12:.1f}",
        "-" if record["mfu"] is None else f"{record['mfu']:.1%}",
        f"{record['of_measured_peak']:.1%}",
        "-" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e9:.1f}",
    )
    return record


def _measure(options: argparse.Namespace, compiled: bool, again: bool) -> dict[str, Any]:
    device = torch.device(options.device)
    changes = {"num_hidden_layers": options.layers, "vocab_size": options.vocab}
    config = shape(options.shape, **{key: value for key, value in changes.items() if value})
    model = random_model(config, device=options.device).train().requires_grad_(True)
    steps = [_texts(options, config.vocab_size, seed) for seed in range(WARM_UPS + options.rounds)]
    trainer = our_trainer(
        model,
        steps,
        device=options.device,
        precision="bfloat16",
        micro_batch_tokens=options.micro_texts * options.context,
        compile=compiled,
        activation_checkpointing=again,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in steps:
        start = time.perf_counter()
        trainer.train_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    took = statistics.median(seconds[WARM_UPS:])
    lengths = [len(segment) for segment in steps[0]]
    flops = training_flops(model, model, lengths) / took
    known = _known_peak() if device.type == "cuda" else None
    return {
        "compile": compiled,
        "activation_checkpointing": again,
        "tokens_s": sum(lengths) / took,
        "flops_s": flops,
        "maker_peak": known,
        "mfu": None if known is None else flops / known,
        "of_measured_peak": flops / peak_flops(device, torch.bfloat16),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "rounds": seconds[WARM_UPS:],
    }


def _texts(options: argparse.Namespace, vocab: int, seed: int) -> list[Segment]:
    rng = np.random.default_rng(seed)
    count = options.micro_texts * options.micro_batches
    return [all_trained(rng.integers(vocab, size=options.context)) for _ in range(count)]


def _known_peak() -> float | None:
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


if __name__ == "__main__":
    main()
