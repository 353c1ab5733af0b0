"""The benchmark of structured outputs runs to its JSON line, and tells wrong answers from key orders."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

PAIR = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}, "required": ["a"]}
ROWS = [
    {
        "id": "pair",
        "schema": PAIR,
        "tests": [
            {"valid": True, "data": {"b": None, "a": 1}},
            {"valid": True, "data": {"a": 2.0}},  # cannot be written, as whole numbers are written without
            {"valid": False, "data": {"a": "1"}},
        ],
    },
    {"id": "unique", "schema": {"uniqueItems": True}, "tests": [{"valid": False, "data": [1, 1]}]},
    {"id": "remote", "schema": {"$ref": "https://example.com/"}, "tests": []},
]


def test_structured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    words = f"--threads 1 --rounds 1 --tokens 8 --batch 2 --data {tmp_path / 'rows.jsonl.gz'}"
    monkeypatch.setattr(sys, "argv", ["structured.py", *words.split()])
    importlib.import_module("structured").main()
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    found = record["exactness"]
    assert found["rungs"] == {"exact": 1, "relaxed": 1, "refused": 1}
    assert found["keywords"]["relaxed"] == {"uniqueItems": 1}
    assert found["instances"] == {"valid": 2, "invalid": 2}
    assert found["false_accepts"] == []
    assert found["file_order_rejects"] == ["pair", "pair"] and found["false_rejects"] == ["pair"]
    assert all(len(speeds["constrained_tokens_s"]) == 1 for speeds in record["speed"].values())
