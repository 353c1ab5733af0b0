"""`methods`, `explain`, `info` and `doctor`: what they tell, for people and for machines."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

import trimtab
from trimtab.cli import explain, info
from trimtab.models.config import config_from_folder
from trimtab.models.hub import SHIPPED, shipped_names
from trimtab.registry import KV_CACHES, SEAMS


def test_methods_lists_every_method(trimtab_cli):
    text = trimtab_cli("methods").stdout
    listed = json.loads(trimtab_cli("methods", "--json").stdout)
    assert set(listed) == set(SEAMS)
    for seam, registry in SEAMS.items():
        assert registry.question in text
        assert [method["name"] for method in listed[seam]] == registry.names()
        for name in registry.names():
            assert f" {name} " in text


def test_methods_of_one_seam(trimtab_cli):
    text = trimtab_cli("methods", "cache").stdout
    assert "full" in text and "perplexity" not in text


@pytest.mark.parametrize("name", KV_CACHES.names())
def test_explain_shows_card_and_options(trimtab_cli, name):
    card = KV_CACHES.get(name).card
    text = " ".join(trimtab_cli("explain", name).stdout.split())
    for part in (card.title, card.idea, card.exactness, card.cost, card.needs, card.avoid_when):
        assert " ".join(part.split())[:40] in text
    records = json.loads(trimtab_cli("explain", name, "--json").stdout)
    (record,) = [record for record in records if record["seam"] == "cache"]
    assert record["card"]["title"] == card.title
    for option in record["options"]:
        assert option["help"], f"option {option['name']} of {name} is not explained"
        assert option["name"] in text


def test_options_are_read_from_metadata_or_docstring():
    @dataclass(frozen=True)
    class Options:
        """Settings.

        bits: how many bits
            a number takes.
        low, high: the bounds.

        Unrelated: text.
        """

        path: str
        bits: Literal[2, 4] = 2
        low: float = 0.0
        high: float | None = None
        sizes: tuple[int, ...] = field(default=(1,), metadata={"help": "from metadata"})

    rows = {row["name"]: row for row in explain.option_rows(Options)}
    assert rows["bits"] == {
        "name": "bits",
        "type": "2 | 4",
        "default": 2,
        "required": False,
        "help": "how many bits a number takes.",
    }
    assert rows["low"]["help"] == rows["high"]["help"] == "the bounds."
    assert (rows["sizes"]["help"], rows["sizes"]["type"]) == ("from metadata", "list of int")
    assert rows["high"]["type"] == "float | none"
    assert (rows["path"]["required"], rows["path"]["help"]) == (True, "")


def test_info_of_the_shipped_model(trimtab_cli):
    model = trimtab.load()
    parameters, layers = sum(p.numel() for p in model.parameters()), len(model.model.layers)
    facts = json.loads(trimtab_cli("info", "--memory", "64MiB", "--json").stdout)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == parameters
    assert facts["context"] == 2048
    half = facts["by_dtype"]["bfloat16"]
    assert half["kv_bytes_per_token"] == 2 * layers * 2 * 64 * 2
    assert half["weight_bytes"] == 2 * parameters
    assert half["tokens_that_fit"] == (64 * 2**20 - half["weight_bytes"]) // half["kv_bytes_per_token"]
    assert half["full_contexts_that_fit"] == half["tokens_that_fit"] // 2048
    text = trimtab_cli("info", "--memory", "64MiB").stdout
    assert f"{parameters:,}" in text and "fits in 64.0 MiB" in text and "2,048 tokens" in text


def test_info_of_a_shipped_model_by_its_name(trimtab_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = json.loads(trimtab_cli("info", "draft", "--json").stdout)
    assert facts["model"] == str(SHIPPED / "draft") and facts["parameters"] <= 1_500_000
    wrong = trimtab_cli("info", "drat")
    assert wrong.exit_code == 2
    assert "there is no folder 'drat'" in wrong.stderr and ", ".join(shipped_names()) in wrong.stderr


def test_what_does_not_fit_is_zero_and_what_is_unknown_is_null():
    config = config_from_folder(SHIPPED / "tiny")
    assert info.describe(config, 1000)["by_dtype"]["float32"]["tokens_that_fit"] == 0
    assert info.describe(config, None)["by_dtype"]["float32"]["tokens_that_fit"] is None


def test_doctor_reports_what_was_measured(trimtab_cli, monkeypatch):
    from trimtab import hardware

    monkeypatch.setattr(hardware, "read_bandwidth", lambda threads=None: 12.5)
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype, threads=None: 60.0 if threads == 1 else 99.0)
    found = json.loads(trimtab_cli("doctor", "--json", "--threads", "1").stdout)
    assert found["read_bandwidth_gb_per_s"] == 12.5
    assert found["matmul_float32_gflop_per_s"] == 60.0
    assert set(found["kernels"]) == {"float32", "bfloat16", "float16"}
    assert {"cpu", "cores", "python", "torch", "compiler"} <= set(found)
    assert "12.5" in trimtab_cli("doctor").stdout


def test_doctor_can_leave_the_measuring_out(trimtab_cli):
    result = trimtab_cli("doctor", "--no-measure")
    assert "bandwidth" not in result.stdout and "python" in result.stdout
