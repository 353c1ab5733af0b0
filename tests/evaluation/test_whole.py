"""The whole chain for real: shipped model, real engines, all tasks, small settings."""

import json

import pytest

from trimtab.evaluation.runner import compare
from trimtab.evaluation.tasks.base import TaskContext
from trimtab.evaluation.tasks.skills import CORE, Skills, SkillsOptions

TASKS = (
    "perplexity:context=96,stride=32,windows=3",
    "needle:lengths=128,depths=2,samples=2",
    "needle:lengths=128,depths=2,samples=2,question=hidden",
    "skills:samples=1",
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
    import trimtab

    engine = trimtab.Engine(None)
    found = Skills(SkillsOptions(samples=64)).run(engine, TaskContext()).metrics
    for name in CORE:
        assert found[name].value > 0.9, name
    assert found["arithmetic"].value < 0.3 and found["word_problems"].value < 0.3
