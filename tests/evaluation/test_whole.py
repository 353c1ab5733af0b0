"""The whole chain for real: shipped model, real engines, all tasks, small settings."""

import json
import math
import re

import pytest

import trimtab
from trimtab.evaluation.runner import compare
from trimtab.evaluation.tasks.base import TaskContext
from trimtab.evaluation.tasks.skills import Skills, SkillsOptions
from trimtab.models.hub import find_folder
from trimtab.skills import SKILLS

TASKS = (
    "perplexity:context=96,stride=32,windows=3",
    "needle:lengths=128,depths=2,samples=2",
    "needle:lengths=128,depths=2,samples=2,question=hidden",
    "skills:skills=json+repeat,samples=1",
    "speed:prompt=48,tokens=8,concurrency=1+2,rounds=1",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    plans = ["full backend=torch", "streaming:sinks=4,window=32 backend=torch"]
    return compare(plans=plans, tasks=TASKS, out=out), out


def test_nothing_fails_and_everything_is_written(report):
    found, out = report
    assert found.errors == []
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert {line["backend"] for line in lines} == {"torch"}
    assert "<svg" in (out / "report.html").read_text()


def test_a_full_cache_holds_sixteen_bits_a_number_and_a_window_holds_less(report):
    found, _ = report
    full, window = (found.row(p.label, TASKS[0]).metrics for p in found.plans)
    assert full["kv_bits"].value == pytest.approx(16, rel=0.15)  # whole pages
    assert window["kv_bytes_held"].value < 0.75 * full["kv_bytes_held"].value


def test_a_window_of_32_costs_quality_and_forgets_the_needle(report):
    found, _ = report
    full, window = (p.label for p in found.plans)
    assert found.row(window, TASKS[0]).metrics["perplexity_change"].value > 0
    for task in TASKS[1:3]:
        assert found.row(full, task).metrics["accuracy"].value == 1
        grid = found.row(window, task).detail["accuracy"]
        assert grid[0] == [0.0]


def test_speed_measures_what_it_promises(report):
    found, _ = report
    metrics = found.rows[4].metrics
    assert metrics["kv_tokens"].value == 56
    assert metrics["throughput_2"].value > 0 and metrics["bandwidth_share"].value > 0
    assert found.rows[4].notes == ()


@pytest.mark.slow
def test_the_shipped_model_has_the_skills_its_card_claims():
    """Each share of the card's table, on exercises drawn anew: both differ by less than four standard errors
    of their difference."""
    card = (find_folder(None) / "README.md").read_text(encoding="utf-8")
    row = r"^\| (\w+)(?:: .*| in 300 tokens of prose) \| ([01]\.\d+) ± 0\.\d+ \(n = (\d+)\) \|$"
    rows = re.findall(row, card, flags=re.MULTILINE)
    claimed = {name: (float(share), int(n)) for name, share, n in rows if name in SKILLS}
    if not claimed:
        pytest.skip("the card of the shipped model has no table made by dev/ship.py")
    found = Skills(SkillsOptions(samples=64)).run(trimtab.Engine(None), TaskContext(seed=1)).metrics
    assert set(claimed) == set(SKILLS)
    for name, (share, n) in claimed.items():
        spread = share * (1 - share) + 1 / n  # that all were right says not that none ever fails
        assert found[name].value == pytest.approx(share, abs=4 * math.sqrt(spread * (1 / n + 1 / 64))), name
