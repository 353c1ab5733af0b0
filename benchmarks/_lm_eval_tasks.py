"""Small tasks for lm-evaluation-harness, made of the shipped text: nothing is fetched.

One task for each kind of request, and in each a text that is longer than the shipped model's context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trimtab.evaluation.corpus import shipped_text

CHOICES, LONG = 4, 12_000  # characters: some 3,000 tokens of the shipped model


def write_tasks(folder: Path, documents: int) -> list[str]:
    """Write the tasks and their data into `folder`; returns their names."""
    paragraphs = _paragraphs()
    tasks = {
        "offline_choice": _choice(paragraphs, documents),
        "offline_last_word": _last_word(paragraphs, documents),
        "offline_rolling": _rolling(paragraphs, documents),
        "offline_generate": _generate(paragraphs, documents),
    }
    for name, (rows, settings) in tasks.items():
        data, shots = folder / f"{name}.jsonl", folder / f"{name}-shots.jsonl"
        for file, part in ((data, rows), (shots, rows[:2])):
            file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data), "train": str(shots)}},
            "test_split": "test",
            "metadata": {"version": 1},
            **settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return list(tasks)


def _paragraphs() -> Iterator[str]:
    return (part for part in shipped_text().split("\n\n") if 30 <= len(part.split()) <= 120)


def _choice(paragraphs: Iterator[str], documents: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The true end of a paragraph among ends of others; every fourth question has several of one token."""
    texts = [next(paragraphs).split() for _ in range(documents + CHOICES)]
    rows = []
    for i, words in enumerate(texts[:documents]):
        size = 1 if i % 4 == 0 else 6
        ends = [" ".join(texts[i + k][-size:]) for k in range(CHOICES)]
        context = " ".join(words[:-size])
        rows.append({"context": context, "ends": ends[1:] + ends[:1], "right": CHOICES - 1})
    rows[-1]["context"] = shipped_text()[:LONG] + rows[-1]["context"]
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    return rows, {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "ends",
        "doc_to_target": "right",
        "metric_list": metrics,
        "fewshot_split": "train",
        "num_fewshot": 1,
    }


def _last_word(paragraphs: Iterator[str], documents: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The last word of a paragraph, or its last mark, which is often the model's own choice too."""
    whole = (text for text in paragraphs if text[-1] == "." and text[-2].isalpha())
    texts = [next(whole) for _ in range(documents)]
    cuts = [text.rindex(" ") if i % 4 == 0 else len(text) - 1 for i, text in enumerate(texts)]
    rows = [{"context": text[:cut], "word": text[cut:]} for text, cut in zip(texts, cuts, strict=True)]
    rows[0]["context"] = ""
    return rows, {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{word}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }


def _rolling(paragraphs: Iterator[str], documents: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Whole texts: short ones, one of several windows, one of characters the vocabulary lacks."""
    rows = [{"text": next(paragraphs)} for _ in range(max(1, documents // 4))]
    rows += [
        {"text": shipped_text()[20_000 : 20_000 + LONG]},
        {"text": "Zażółć gęślą jaźń, 日本語 – naïve 😀"},
    ]
    return rows, {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }


def _generate(paragraphs: Iterator[str], documents: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The beginning of a paragraph, to be continued up to the end of a sentence."""
    texts = [next(paragraphs).split() for _ in range(documents)]
    rows = [{"context": " ".join(words[:20]), "rest": " ".join(words[20:])} for words in texts]
    rows[-1]["context"] = shipped_text()[:LONG] + rows[-1]["context"]
    return rows, {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{rest}}",
        "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 48, "do_sample": False},
        "metric_list": [{"metric": "bleu"}, {"metric": "chrf"}],
    }
