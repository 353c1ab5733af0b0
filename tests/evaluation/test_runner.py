"""The comparison's bookkeeping, with scripted engines; `test_whole.py` runs it for real."""

import json
import math

import pytest

import trimtab
from evaluation.fakes import MODEL, ScriptedEngine
from trimtab.engine.engine import Engine
from trimtab.errors import ConfigError, OutputError, PlanError, RequestError
from trimtab.evaluation.runner import compare
from trimtab.plan import Plan

SMALL = ("perplexity:context=32,stride=16,windows=4", "speed:prompt=20,tokens=4,concurrency=2,rounds=3")


@pytest.fixture
def engines(monkeypatch):
    """Engines by plan label; a plan that is not listed gets a plain one. Models are never loaded."""
    made: dict[str, ScriptedEngine] = {}
    monkeypatch.setattr("trimtab.models.checkpoint.load", lambda *a, **k: None)
    monkeypatch.setattr("trimtab.evaluation.runner.describe_model", lambda model: MODEL)

    def from_plan(plan, model=None):
        engine = made.setdefault(plan.label, ScriptedEngine())
        if isinstance(engine, Exception):
            raise engine
        return engine

    monkeypatch.setattr(Engine, "from_plan", staticmethod(from_plan))
    return made


def losing(nats):
    return lambda context, tokens: ([-nats] * len(tokens), [True] * len(tokens))


def test_public_names():
    assert trimtab.compare is compare
    assert trimtab.Report.__name__ == "Report"


def test_every_plan_meets_every_task_in_order(engines):
    report = compare(plans=["full", "streaming"], tasks=SMALL)
    labels = ("perplexity:context=32,stride=16,windows=4", "speed:prompt=20,tokens=4,concurrency=2")
    assert [(r.plan, r.task) for r in report.rows] == [
        (plan, task) for plan in ("full", "streaming") for task in labels
    ]
    assert report.errors == [] and report.reference == "full"


def test_others_are_measured_against_the_first(engines):
    engines["full"] = ScriptedEngine(judge=losing(2.0))
    engines["streaming"] = ScriptedEngine(judge=losing(2.5))
    report = compare(plans=["full", "streaming"], tasks=SMALL[:1])
    first, second = report.rows
    assert "perplexity_change" not in first.metrics
    assert second.metrics["perplexity_change"].value == pytest.approx(math.exp(2.5) - math.exp(2.0))
    record = report.records()[1]
    assert record["metrics"]["perplexity"]["ratio_to_first"] == pytest.approx(math.exp(0.5))


def test_a_plan_or_task_that_fails_is_recorded_and_the_rest_goes_on(engines):
    def broken(context, tokens):
        raise RuntimeError("the cache fell over")

    engines["h2o"] = RequestError("kv_memory is too small")
    engines["streaming"] = ScriptedEngine(judge=broken)
    report = compare(plans=["full", "h2o", "streaming", "snapkv"], tasks=SMALL)
    errors = {(r.plan, r.task.split(":")[0]): r.error for r in report.errors}
    assert errors == {
        ("h2o", "perplexity"): "kv_memory is too small",
        ("h2o", "speed"): "kv_memory is too small",
        ("streaming", "perplexity"): "RuntimeError: the cache fell over",
    }
    assert all(r.metrics for r in report.rows if r.error is None)
    assert len(report.rows) == 8


def test_a_first_plan_that_fails_leaves_the_others_without_ratios(engines):
    engines["full"] = RequestError("no")
    report = compare(plans=["full", "streaming"], tasks=SMALL[:1])
    record = report.records()[1]
    assert record["metrics"]["perplexity"]["ratio_to_first"] is None
    assert "perplexity_change" not in record["metrics"]


def rounds_seen(engines, **options):
    order = []
    for label in ("full", "streaming"):
        engine = engines[label] = ScriptedEngine()
        generate = engine.generate

        def noting(prompts, params, label=label, generate=generate):
            order.append(label)
            return generate(prompts, params)

        engine.generate = noting
    compare(plans=["full", "streaming"], tasks=SMALL[1:], **options)
    return order


def test_plans_take_turns_round_by_round(engines):
    assert rounds_seen(engines) == ["full", "streaming"] * 4
    assert rounds_seen(engines, alternate=False) == ["full"] * 4 + ["streaming"] * 4


def test_an_engine_that_fails_in_its_turn_leaves_the_others_their_turns(engines):
    engine = engines["streaming"] = ScriptedEngine()
    engine.stats = lambda: (_ for _ in ()).throw(RuntimeError("broken meter"))
    report = compare(plans=["full", "streaming", "h2o"], tasks=SMALL[1:])
    assert [r.plan for r in report.errors] == ["streaming"]
    assert report.rows[2].metrics["throughput_2"].n == 3


def test_progress_rises_from_nothing_to_all(engines):
    engines["h2o"] = RequestError("no")
    shares = []
    compare(plans=["full", "h2o", "streaming"], tasks=SMALL, progress=lambda p: shares.append(p.share))
    assert shares[0] < 0.2 and shares[-1] == pytest.approx(1.0)
    assert shares == sorted(shares)
    assert max(shares) <= 1.0


@pytest.mark.parametrize(
    ("plans", "tasks", "error", "complaint"),
    [
        (["full", "kivy"], SMALL, ConfigError, "Did you mean 'kivi'"),
        (["full", "full"], SMALL, ConfigError, "the plan 'full' is given twice"),
        (["full"], ["needle", "needle"], ConfigError, "the task 'needle' is given twice"),
        (["full"], ["needles"], ConfigError, "Did you mean 'needle'"),
        (["full"], ["needle:depth=3"], ConfigError, "Did you mean 'depths'"),
        ([], SMALL, ConfigError, "at least one plan"),
        (["full"], [], ConfigError, "at least one task"),
        (["full", "full device=cuda backend=native"], SMALL, PlanError, "backend=native is for CPUs"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(monkeypatch, plans, tasks, error, complaint):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("trimtab.models.checkpoint.load", load)
    with pytest.raises(error, match=complaint):
        compare(plans=plans, tasks=tasks)


def test_an_unwritable_folder_is_found_before_anything_is_measured(engines, tmp_path):
    (tmp_path / "file").write_text("in the way")
    engines["full"] = engine = ScriptedEngine()
    with pytest.raises(OutputError):
        compare(tasks=SMALL, out=tmp_path / "file")
    assert engine.calls == []


def test_a_lone_string_is_one_plan_and_one_task(engines):
    report = compare(plans="full", tasks=SMALL[0])
    assert len(report.rows) == 1


def test_plans_may_be_mappings_and_plan_objects(engines):
    report = compare(plans=[{"cache": "full"}, Plan(cache="streaming")], tasks=SMALL[:1])
    assert [p.label for p in report.plans] == ["full", "streaming"]


def test_a_loaded_model_cannot_become_another(monkeypatch):
    from evaluation.fakes import CONFIG

    class Loaded:
        dtype, device, config = "torch.float32", "cpu", CONFIG

    with pytest.raises(ConfigError, match="asks for dtype=bfloat16, but the model handed in"):
        compare(Loaded(), plans=["full dtype=bfloat16"], tasks=SMALL)


def test_seeds_reach_tasks_and_records(engines):
    task = "needle:lengths=128,depths=1,samples=1"
    reports = [compare(tasks=task, seed=seed) for seed in (0, 0, 1)]
    prompts = [call[0] for call in engines["full"].calls]
    assert prompts[0] == prompts[1] != prompts[2]
    assert [r.records()[0]["seed"] for r in reports] == [0, 0, 1]


def test_out_writes_the_report(engines, tmp_path):
    compare(plans=["full", "streaming"], tasks=SMALL, out=tmp_path / "new")
    lines = (tmp_path / "new" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[3])["plan"] == "streaming"
    assert (tmp_path / "new" / "report.html").read_text().startswith("<!doctype html>")
