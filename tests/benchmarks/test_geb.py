"""The benchmark of the shipped models runs from its command line to its JSON line, on the smallest work."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from kernels.libraries import native_kernels


def test_geb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    native_kernels()
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    words = "geb.py --threads 1 --rounds 1 --models draft --formats float32 --prompts 4 9 --tokens 3"
    monkeypatch.setattr(sys, "argv", words.split())
    importlib.import_module("geb").main()
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert record["benchmark"] == "geb" and record["claims"] == []
    row = record["results"]["draft"]["float32"]
    assert set(row["first_token"]) == {"4", "9"}
    assert row["decode_tokens_s"] > 0 and row["share_of_ceiling"] > 0
    # 0.88M parameters of 4 bytes, and what five tokens and a half keep in 2 layers of one head of 64.
    assert row["bytes_per_token"] == pytest.approx(row["weight_bytes"] + 5.5 * 2 * 2 * 64 * 4, rel=0.01)
