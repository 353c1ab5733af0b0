"""`benchmarks/serving.py` asks a real server its questions, on the smallest work there is."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SMALL = "--quick --clients 4 --seconds 2 --chats 3 --system 128 --leavers 12 --intervals 20ms --threads 1"


@pytest.mark.parametrize("part", ["streams", "overhead", "prefix", "restart", "disconnect"])
def test_a_part_runs_to_its_json_line(monkeypatch, capsys, part):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["serving.py", "--parts", part, *SMALL.split()])
    importlib.import_module("serving").main()
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert record["benchmark"] == "serving"
    assert list(record["results"]) == [part]
    # What no neighbour on the machine can spoil.
    exact = [c for c in record["claims"] if c["target"] == 0]
    assert all(c["met"] for c in exact)
    assert len(exact) == {"streams": 2, "disconnect": 2}.get(part, 0)
    assert all(c["value"] is not None for c in record["claims"])
