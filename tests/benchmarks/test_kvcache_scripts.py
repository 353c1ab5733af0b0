"""The benchmarks of cache policies, from the command line to the JSON line, on the smallest work there is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import trimtab
from trimtab import Engine
from trimtab.models.shapes import random_model, shape
from trimtab.plan import Plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def script(name: str) -> ModuleType:
    """By path: the tests have a package `kvcache` of their own."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(
    name: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--threads", "1", "--rounds", "1", *arguments.split()])
    script(name).main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert sum(line.startswith("{") for line in lines) == 1
    record = json.loads(lines[-1])
    assert record["benchmark"].split("-")[0] == name
    return record


def test_kvcache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--policies streaming kivi:bits=4,residual=32 nosuch --contexts 128 --batches 2 --tokens 2 "
        "--windows 1 --scored 16 --samples 1 --no-outliers --dtype float32"
    )
    record = run("kvcache", words, monkeypatch, capsys)
    [table] = record["results"]
    policies = table["policies"]
    assert "unknown cache method 'nosuch'" in policies["nosuch"]["why"]
    full = policies["full"]["speeds"]["2"]
    # Whole pages of 16 tokens.
    row = trimtab.load(dtype="float32").kv_bytes_per_token()
    assert full["held"] == full["analytic"] == -(-full["tokens"] // 16) * 16 * row
    assert full["of_full"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    packed = policies["kivi:bits=4,residual=32"]
    assert packed["speeds"]["2"]["bits"] < 17 and packed["why"] is None
    losses = [p["perplexity"]["metrics"]["perplexity"][0] for p in (packed, policies["full"])]
    assert losses[0] != losses[1]
    bytes_off = [c for c in record["claims"] if "analytic" in c["name"]]
    assert len(bytes_off) == 3 and all(c["met"] for c in bytes_off)


def test_hydragen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--models random --prefix 520 --suffix 3 --requests 2 --sub-prompts 1 --tokens 2 --prefixes 512 "
        "--batches 2 --dtype float32"
    )
    record = run("hydragen", words, monkeypatch, capsys)
    one = {r["engine"]: r for r in record["results"] if r["requests"] == "one prefix"}
    assert [r["logits_difference"] for r in one.values()] == [0.0, 0.0, 0.0]
    # Shared is what lies in whole blocks of 512 tokens: one of them once instead of twice.
    token = 4 * 8 * 2 * 64 * 4
    assert one["alone"]["kv_read_per_step"] - one["shared"]["kv_read_per_step"] == 512 * token
    assert one["shared"]["kv_held"] == one["alone"]["kv_held"] < one["own copies"]["kv_held"]
    [attention] = record["attention"]
    row = trimtab.load(dtype="float32").kv_bytes_per_token()
    assert attention["kv_read_alone"] - attention["kv_read_shared"] == 512 * row


def test_kvpress_is_not_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--lengths 128 --samples 1 --records 2 --lookups 1 --windows 1 --context 64 --scored 4"
    record = run("kvpress_comparison", words, monkeypatch, capsys)
    assert record["results"] == [] and record["kvpress_versions"] is None
    assert [claim["met"] for claim in record["claims"]] == [None]


@pytest.mark.parametrize("kept", [85, 100, 256, 475])
def test_our_budget_never_holds_more_than_kvpress(kept: int) -> None:
    comparison = script("kvpress_comparison")
    generated = range(12)
    rows = {pair.press: pair.rows for pair in comparison.PAIRS}

    def pages(count: int) -> int:
        return -(-count // 16) * 16

    budget = rows["SnapKV"](kept, generated, 512)
    assert all(pages(budget + g) <= kept + g for g in generated) and budget > kept - 32
    budget = rows["ObservedAttention"](kept, generated, 512)
    assert pages(budget) * (512 + 8) <= kept * 512
    window = rows["StreamingLLM"](kept, generated, 512)
    assert all(pages(n) - ((n + 1 - window) // 16 * 16 - 16) <= kept for n in range(600, 640))


@pytest.mark.parametrize("cache", ["full", "streaming:window=33", "kivi:bits=2,residual=32", "h2o:budget=40"])
@pytest.mark.parametrize("length", [90, 96, 131])
def test_analytic_bytes_are_those_held(cache: str, length: int) -> None:
    import _analytic
    from _contenders import greedy

    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    config = shape("125m", hidden_size=64, num_hidden_layers=2, vocab_size=96, **heads)
    engine = Engine(random_model(config), cache=cache, threads=1, max_batch=1, kv_memory="16MiB")
    [out] = engine.generate([[5] * (length - 20)], greedy(21))
    text = _analytic.Text(length - 20, length, config, item=4)
    assert out.metrics.kv_bytes_held == _analytic.analytic_bytes(Plan(cache=cache).cache, text)


def test_the_stretched_model_is_the_shipped_one_below() -> None:
    import _models

    short, long = _models.variant("float32"), _models.variant("float32", context=8192)
    assert (short.config.context_length, long.config.context_length) == (2048, 8192)
    assert all(a.equal(b) for a, b in zip(short.parameters(), long.parameters(), strict=True))
    assert long.config.rope.kind == "yarn" and long.config.rope.factor == 4.0
