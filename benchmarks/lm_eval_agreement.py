"""lm-evaluation-harness over trimtab and over its own `hf` backend: do they say the same?

Both run the shipped model in float32 on the CPU, over small tasks made of the shipped text, one for each kind
of request, each with a text longer than the model's context. A third run, `hf` in float64, tells whose
rounding a difference is. Needs `pip install 'trimtab[lm-eval]' transformers accelerate`.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from _common import Claim, Table, arguments, begin, finish, positive, progress
from _lm_eval_tasks import write_tasks

from trimtab.models.hub import find_folder

UNIT = 1e-3
RUNS = {"trimtab": ("trimtab", "float32"), "hf": ("hf", "float32"), "hf float64": ("hf", "float64")}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--documents", type=positive, default=24, help="documents a task (default 24)")
    options = begin(parser)
    for package in ("lm_eval", "transformers", "accelerate"):
        # Not imported yet: the harness's libraries read the environment when they are.
        if importlib.util.find_spec(package) is None:
            raise SystemExit(
                f"{package} is not installed (pip install 'trimtab[lm-eval]' transformers accelerate)"
            )
    results = run_all(options.documents, options.threads)
    tables, claims, record = compare(results)
    finish("lm-eval-agreement", tables, claims, record, options, seed=1234)


def run_all(documents: int, threads: int) -> dict[str, dict[str, Any]]:
    """What the harness answers for each of the runs, samples included."""
    with tempfile.TemporaryDirectory() as folder:
        # Before the harness's libraries are imported: they read these once.
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_DATASETS_CACHE": f"{folder}/cache",
        }
        import lm_eval
        import torch
        from lm_eval.tasks import TaskManager

        import trimtab.evaluation.lm_eval  # noqa: F401  makes the name `trimtab` known

        torch.set_num_threads(threads)
        names = write_tasks(Path(folder), documents)
        results = {}
        for run, (model, dtype) in RUNS.items():
            progress(f"{run} ...")
            args: dict[str, Any] = {"pretrained": str(find_folder(None)), "dtype": dtype}
            if model == "trimtab":
                args["threads"] = threads
            results[run] = lm_eval.simple_evaluate(
                model=model,
                model_args=args,
                tasks=names,
                device="cpu",
                batch_size=4,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=TaskManager(include_path=folder),
            )
        return results


def compare(results: Mapping[str, dict[str, Any]]) -> tuple[list[Table], list[Claim], dict[str, Any]]:
    ours, theirs, exact = (results[run] for run in RUNS)
    scores = Table("metrics", ["task", "metric", "trimtab", "hf", "difference"])
    worst_metric = 0.0
    for task, metrics in ours["results"].items():
        for name, value in metrics.items():
            other = theirs["results"][task][name]
            if not isinstance(value, float) or name.startswith("sample"):
                continue
            apart = abs(value - other) / max(1.0, abs(other))
            worst_metric = max(worst_metric, apart)
            scores.add(task, name.removesuffix(",none"), f"{value:.6f}", f"{other:.6f}", f"{apart:.1e}")
    answers = Table(
        "answers",
        ["task", "answers", "largest |logprob|", "from hf", "from hf float64", "hf's own", "as likeliest"],
    )
    worst = {"single": 0.0, "whole text": 0.0}
    flags_differ = texts = texts_differ = 0
    for task in ours["samples"]:
        rows = list(zip(*(_answers(run, task) for run in (ours, theirs, exact)), strict=True))
        if isinstance(rows[0][0], str):
            texts += len(rows)
            texts_differ += sum(a != b for a, b, _ in rows)
            answers.add(task, str(len(rows)), *[""] * 5)
            continue
        a, b, c = (([r[i][0] for r in rows]) for i in range(3))
        flags_differ += sum(r[0][1] != r[1][1] for r in rows)
        kind = "whole text" if "rolling" in task else "single"
        # A whole text's log-likelihood grows with its length, and with it what float32 can tell apart.
        scale = [max(1.0, abs(x) / 1000) if kind == "whole text" else 1.0 for x in c]
        worst[kind] = max(worst[kind], *(abs(x - y) / s for x, y, s in zip(a, b, scale, strict=True)))
        answers.add(
            task,
            str(len(rows)),
            f"{max(map(abs, c)):.1f}",
            *(
                f"{max(abs(x - y) for x, y in zip(*pair, strict=True)):.1e}"
                for pair in ((a, b), (a, c), (b, c))
            ),
            f"{sum(bool(r[0][1]) for r in rows)}" if kind == "single" else "",
        )
    claims = [
        Claim("largest difference of a log-likelihood, in 0.001", worst["single"] / UNIT, 1, at_most=True),
        Claim("the same of a whole text, for each 1000 of it", worst["whole text"] / UNIT, 1, at_most=True),
        Claim("largest difference of a metric, relative above 1", worst_metric / UNIT, 1, at_most=True),
        Claim("greedy flags that differ", float(flags_differ), 0, at_most=True),
        Claim(f"greedy texts that differ, of {texts}", float(texts_differ), 0, at_most=True),
    ]
    info = {key: value for key, value in ours["config"].items() if key.startswith(("model_", "trimtab_"))}
    del info["model_args"]
    # Where the model lies says nothing to others.
    info["trimtab_plan"] = info["trimtab_plan"].replace(f"model={find_folder(None)} ", "")
    record = {"metrics": {run: result["results"] for run, result in results.items()}, "model": info}
    return [scores, answers], claims, record


def _answers(result: Mapping[str, Any], task: str) -> Iterator[Any]:
    """Answers in the documents' order: a text, or (log-likelihood, whether it is the likeliest)."""
    for sample in sorted(result["samples"][task], key=lambda s: s["doc_id"]):
        for responses in sample["resps"]:
            answer = responses[0]
            yield answer if isinstance(answer, str | tuple | list) else (answer, None)


if __name__ == "__main__":
    main()
