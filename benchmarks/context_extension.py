"""What raising the rotary base and training on longer texts does: needles by length and depth, and the loss.

    benchmarks/context_extension.py runs/tiny/model runs/long-4x/model runs/long-16x/model

A model is also asked beyond its context, up to `--beyond` times as far: the limit is lifted then and nothing
else is changed, which shows what the first one does there before it is extended. The loss is that of the same
held-out text in windows of 2,048 tokens (what is lost on short texts) and of each longer length (whether more
context helps or hurts).
"""

from __future__ import annotations

from typing import Any

import torch
from _common import Table, arguments, begin, finish, positive, progress

import trimtab
from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.tasks.base import TaskContext
from trimtab.evaluation.tasks.needle import Needle, NeedleOptions, depths_of
from trimtab.models.transformer import Model
from trimtab.training.recipe import ModelSettings
from trimtab.training.setup import with_context

SHORT = 2048  # tokens of a window in which the loss on short texts is measured
ROOM = 64  # positions beyond the longest prompt, for the answer


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("models", nargs="+", help="folders: the extended one, then the results")
    parser.add_argument("--lengths", nargs="+", type=positive, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--depths", type=positive, default=5, help="places of the needle, from start to end")
    parser.add_argument(
        "--samples", nargs="+", type=positive, default=[4], help="prompts a cell, for all or each length"
    )
    parser.add_argument("--beyond", type=positive, default=4, help="times its context a model is asked")
    parser.add_argument("--windows", type=positive, default=4, help="windows of the longest length to score")
    options = begin(parser)
    if len(options.samples) == 1:
        options.samples *= len(options.lengths)
    if len(options.samples) != len(options.lengths):
        parser.error(
            f"--samples: {len(options.samples)} for {len(options.lengths)} --lengths; give 1 or as many"
        )

    depths = depths_of(options.depths)
    places = [f"at {depth:.0%}" for depth in depths]
    columns = ["model", "rope base", "context", "prompt", "a cell", *places, "found"]
    needles = Table("Needles found, by length and depth of the prompt", columns)
    lengths = sorted({SHORT, *(length for length in options.lengths if length > SHORT)})
    losses = Table(
        "Loss on held-out text, nats per token", ["model", *(f"windows of {length:,}" for length in lengths)]
    )
    record: dict[str, Any] = {}
    for name in options.models:
        record[name] = one(name, options, lengths, needles, losses)
    finish("context-extension", [needles, losses], [], {"results": record}, options)


def one(name: str, options: Any, lengths: list[int], needles: Table, losses: Table) -> dict[str, Any]:
    """Measure one model and add its rows."""
    model = trimtab.load(name, dtype="float32")
    context, base = model.config.context_length, model.config.rope.theta
    farthest = context * options.beyond
    longest = max(length for length in lengths if length <= farthest) + ROOM
    if context < longest:
        model = with_context(model, ModelSettings(source=name, context=longest))
    found: dict[str, Any] = {"context": context, "rope_theta": base, "needles": {}, "loss": {}}
    engine = trimtab.Engine(model, threads=options.threads, prefix_caching=False, max_batch=4)
    for length, samples in zip(options.lengths, options.samples, strict=True):
        if length > farthest:
            continue
        progress(f"{name}: needles in {length:,} tokens")
        task = Needle(NeedleOptions((length,), depths=options.depths, samples=samples))
        result = task.run(engine, TaskContext())
        cells = [row[0] for row in result.detail["accuracy"]]
        total = result.metrics["accuracy"].value
        shown = [f"{cell:.0%}" for cell in (*cells, total)]
        needles.add(name, f"{base:,.0f}", f"{context:,}", f"{length:,}", str(samples), *shown)
        found["needles"][str(length)] = {"depths": cells, "found": total}
    for length in lengths:
        if length <= farthest:
            progress(f"{name}: loss in windows of {length:,} tokens")
            found["loss"][str(length)] = loss_of(model, length, options.windows, max(lengths))
    losses.add(name, *(f"{found['loss'][str(n)]:.4f}" if n <= farthest else "" for n in lengths))
    return found


@torch.inference_mode()
def loss_of(model: Model, length: int, windows: int, longest: int) -> float:
    """Mean loss over the shipped text in windows of `length`, as far as `windows` of the `longest` reach."""
    tokenizer = model.tokenizer
    assert tokenizer is not None and tokenizer.bos_id is not None
    ids = tokenizer.encode(shipped_text(), add_special_tokens=False)
    end = longest * min(windows, len(ids) // longest)
    total, count = 0.0, 0
    for start in range(0, end - length + 1, length):
        window = torch.tensor([tokenizer.bos_id, *ids[start : start + length]])
        logits = model(window[None, :-1])[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += length
    return total / count


if __name__ == "__main__":
    main()
