"""Each benchmark runs from its command line to its JSON line, on the smallest work there is."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def run(
    name: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--threads", "1", "--rounds", "1", *arguments.split()])
    importlib.import_module(name).main()
    lines = capsys.readouterr().out.strip().splitlines()
    record = json.loads(lines[-1])
    assert record["benchmark"] == name
    assert {"versions", "hardware", "commit", "options"} <= set(record)
    assert sum(line.startswith("{") for line in lines) == 1
    return record


@pytest.fixture
def _nothing_else_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "llama_cpp"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the GPU rows take an 8B model


@pytest.mark.usefixtures("_nothing_else_installed")
def test_decode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = run("decode", "--dtypes float32 --tokens 4 --shapes", monkeypatch, capsys)
    engines = record["results"]["shipped float32"]["engines"]
    assert engines["trimtab"]["tokens_s"] > 0
    assert engines["transformers"] is None and engines["llama.cpp"] is None
    # Parameters of 4 bytes, nearly all of them in products, and a little cache.
    size = 4 * trimtab.load().num_parameters()
    assert 0.95 * size < record["results"]["shipped float32"]["bytes_per_token"] < 1.02 * size
    assert {claim["met"] for claim in record["claims"]} == {None}


@pytest.mark.usefixtures("_nothing_else_installed")
def test_throughput(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--dtypes float32 --requests 3 --prompts 2 5 --outputs 1 4 --batches 2 --profile"
    record = run("throughput", words, monkeypatch, capsys)["results"]["shipped float32"]
    assert 3 <= record["useful_tokens"] <= 12
    assert record["engines"]["transformers"] is None
    assert record["profile_us"]


def test_kvmemory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--policies streaming --context 128 --outputs 4 --requests 4 --dtype float32"
    record = run("kvmemory", words, monkeypatch, capsys)
    full = record["results"]["full"]
    assert full["held_per_text"] == 128 * trimtab.load(dtype="float32").kv_bytes_per_token()
    for policy in record["results"].values():
        assert policy["bounded"]["peak"] <= policy["bounded"]["kv_memory"]
        assert policy["bounded"]["same_tokens"] == 4
    assert full["bounded"]["preemptions"] > 0
    assert all(claim["met"] for claim in record["claims"])
