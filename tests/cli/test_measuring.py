"""`compare`, `eval` and `bench`: the right plans and tasks arrive, and their results go where they should."""

from __future__ import annotations

import json

import pytest

import trimtab

SMALL = "perplexity:context=32,stride=8,windows=2"


@pytest.fixture
def asked(monkeypatch):
    """Records the arguments of `trimtab.compare` instead of measuring."""
    seen = {}

    def remember(model, plans, tasks, **rest):
        seen.update(model=model, plans=list(plans), tasks=list(tasks), **rest)
        raise trimtab.TrimtabError("seen")

    monkeypatch.setattr(trimtab, "compare", remember, raising=False)
    return seen


def test_compare_passes_plans_tasks_and_settings_on(trimtab_cli, asked, tmp_path):
    words = f"compare some/model --plan full --plan h2o --task needle --task {SMALL} --dtype fp32 --seed 7"
    trimtab_cli(*words.split(), "--out", str(tmp_path))
    plans = [trimtab.Plan("some/model", cache=cache, dtype="float32") for cache in ("full", "h2o")]
    assert asked["plans"] == plans
    assert asked["tasks"] == ["needle", SMALL]
    assert (asked["out"], asked["seed"]) == (tmp_path, 7)


def test_compare_reads_plan_files(trimtab_cli, asked, tmp_path):
    (tmp_path / "best.yaml").write_text("cache: streaming\nmax_batch: 4\n")
    trimtab_cli("compare", "--plan", str(tmp_path / "best.yaml"), "--threads", "1")
    assert asked["plans"] == [trimtab.Plan(cache="streaming", max_batch=4, threads=1)]


def test_eval_measures_one_plan(trimtab_cli, asked):
    trimtab_cli("eval", "--task", SMALL, "--cache", "streaming")
    assert (asked["plans"], asked["tasks"]) == ([trimtab.Plan(cache="streaming")], [SMALL])


@pytest.mark.parametrize(("words", "task"), [([], "speed"), (["--speed", "a=1,b=2"], "speed:a=1,b=2")])
def test_bench_is_the_speed_task(trimtab_cli, asked, words, task):
    trimtab_cli("bench", "--cache", "full", *words)
    assert (asked["plans"], asked["tasks"]) == ([trimtab.Plan()], [task])


def test_a_real_comparison_prints_a_table_and_writes_a_report(trimtab_cli, tmp_path):
    words = ["compare", "--plan", "full", "--plan", "streaming", "--task", SMALL, "--backend", "torch"]
    result = trimtab_cli(*words, "--out", str(tmp_path / "report"))
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][0] == "plan"
    assert [line[0] for line in lines[1:3]] == ["full", "streaming"]
    rows = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    assert [row["plan"].split()[0] for row in rows] == ["full", "streaming"]
    assert "<html" in (tmp_path / "report" / "report.html").read_text()


def test_json_is_one_line_of_rows(trimtab_cli):
    result = trimtab_cli("eval", "--task", SMALL, "--backend", "torch", "--json")
    (row,) = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert row["error"] is None
    assert row["metrics"]


def test_a_failed_row_is_told_and_ends_with_1(trimtab_cli, monkeypatch):
    from trimtab.registry import TASKS

    def broken(self, engine, ctx):
        raise trimtab.TrimtabError("the text is too short")

    monkeypatch.setattr(TASKS.get("perplexity").cls, "run", broken)
    result = trimtab_cli("eval", "--task", "perplexity", "--backend", "torch")
    assert result.exit_code == 1
    assert "failed: perplexity with full backend=torch: the text is too short" in result.stderr
