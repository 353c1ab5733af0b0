"""`--weights`: the option reaches the engine, and `info` tells the bytes that are then really held."""

from __future__ import annotations

import json

import trimtab
from trimtab.cli import info
from trimtab.models.config import config_from_folder


def test_generate_runs_on_int8_weights(trimtab_cli):
    words = [
        "generate",
        "The captain",
        "--max-tokens",
        "6",
        "--temperature",
        "0",
        "--backend",
        "torch",
        "--json",
    ]
    record = json.loads(trimtab_cli(*words, "--weights", "int8").stdout)
    assert record["plan"]["weights"] == {"name": "int8", "options": {}}
    params = trimtab.SamplingParams(max_tokens=6, temperature=0)
    expected = trimtab.Engine(weights="int8", backend="torch").generate("The captain", params)[0]
    assert record["outputs"][0]["token_ids"] == expected.token_ids


def test_an_unknown_way_is_one_line(trimtab_cli):
    result = trimtab_cli("generate", "x", "--weights", "int9")
    assert result.exit_code == 2
    assert result.stderr == "error: unknown weights method 'int9'. Did you mean 'int8'?\n"


def test_info_tells_the_bytes_of_int8():
    model = trimtab.load(weights="int8")
    assert model.path is not None
    facts = info.describe(config_from_folder(model.path), None)["by_dtype"]
    assert facts["int8"]["weight_bytes"] == model.weight_bytes() < 0.51 * facts["bfloat16"]["weight_bytes"]
    assert facts["int8"]["kv_bytes_per_token"] == facts["bfloat16"]["kv_bytes_per_token"]
