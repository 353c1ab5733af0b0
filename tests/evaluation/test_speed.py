from types import SimpleNamespace

import pytest
import torch

from evaluation.fakes import ScriptedEngine
from trimtab import hardware
from trimtab.errors import ConfigError
from trimtab.evaluation.statistics import median, quantile
from trimtab.evaluation.tasks.base import TaskContext
from trimtab.evaluation.tasks.speed import Speed, SpeedOptions, bandwidth_metrics
from trimtab.models.config import config_from_folder
from trimtab.models.hub import find_folder

OPTIONS = {"prompt": 40, "tokens": 6, "concurrency": (2, 4), "rounds": 3}


def run(engine, **options):
    return Speed(SpeedOptions(**{**OPTIONS, **options})).run(engine, TaskContext())


def test_times_are_read_from_the_tokens_arrivals():
    metrics = run(ScriptedEngine(slowness=2.0)).metrics
    assert metrics["ttft_2"].value == pytest.approx(1.0)
    assert metrics["time_per_token_p50_4"].value == pytest.approx(0.2)
    assert metrics["time_per_token_p95_4"].value == pytest.approx(0.2)
    assert metrics["ttft_2"].n == 3 * 2 and metrics["time_per_token_p50_4"].n == 3 * 4 * 5
    assert metrics["throughput_2"].value > 0
    assert metrics["kv_bytes_peak_4"].value == 777
    assert metrics["kv_bytes_held"].value == 10 * 46
    assert metrics["kv_tokens"].value == 46


def test_latency_is_shown_for_the_lowest_concurrency_and_pictures_take_the_highest():
    metrics = run(ScriptedEngine()).metrics
    assert [n for n, m in metrics.items() if m.label.startswith("TTFT")] == ["ttft_2"]
    assert [n for n, m in metrics.items() if m.axis == "speed"] == ["throughput_4"]


def test_no_prompt_is_ever_sent_twice_and_lengths_are_exact():
    engine = ScriptedEngine()
    run(engine)
    prompts = [p for call in engine.calls if call != "reset_stats" for p in call[0]]
    assert len(prompts) == (1 + 3) * (2 + 4)  # a warm-up and three rounds
    assert {len(p) for p in prompts} == {40}
    assert len({tuple(p[:8]) for p in prompts}) == len(prompts)


def test_equal_seeds_send_equal_prompts():
    one, other, third = ScriptedEngine(), ScriptedEngine(), ScriptedEngine()
    run(one)
    run(other)
    Speed(SpeedOptions(**OPTIONS)).run(third, TaskContext(seed=1))
    sent = [[c[0] for c in e.calls if c != "reset_stats"] for e in (one, other, third)]
    assert sent[0] == sent[1] != sent[2]


def test_a_model_without_tokenizer_gets_drawn_ids():
    engine = ScriptedEngine()
    full = run(engine).metrics["kv_bytes_held"].value
    tokenizer = engine.model.tokenizer
    engine.model.tokenizer = SimpleNamespace(
        available=False, encode=tokenizer.encode, decode=tokenizer.decode
    )
    assert run(engine).metrics["kv_bytes_held"].value == full


def test_prefix_hits_are_confessed():
    assert run(ScriptedEngine()).notes == ()
    assert "came from the prefix cache" in run(ScriptedEngine(hits=5)).notes[0]


def priced(device="cpu", dtype=torch.bfloat16):
    from trimtab.models.costs import matmul_bytes

    weight = SimpleNamespace(element_size=lambda: dtype.itemsize, device=torch.device(device))
    config = config_from_folder(find_folder(None))
    model = SimpleNamespace(
        config=config,
        parameters=lambda: iter([weight]),
        matmul_bytes=lambda active_only: matmul_bytes(config, dtype.itemsize, active_only=active_only),
    )
    return SimpleNamespace(model=model, runner=SimpleNamespace(model=model), threads=1)


def test_bandwidth_is_bytes_per_token_over_time_and_its_share_of_the_ceiling(monkeypatch):
    asked = []

    def ceiling(threads, size):
        asked.append((threads, size))
        return 10.0

    monkeypatch.setattr(hardware, "read_bandwidth", ceiling)
    metrics = bandwidth_metrics(priced(), 0.002, [1_000_000, 1_000_000])
    c = config_from_folder(find_folder(None))
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size
    matmul_bytes = 2 * (c.vocab_size * c.hidden_size + c.num_layers * layer)
    assert metrics["step_bytes"].value == matmul_bytes + 1_000_000
    assert asked == [(1, matmul_bytes + 1_000_000)]
    assert metrics["bandwidth"].value == pytest.approx(metrics["step_bytes"].value / 0.002 / 1e9)
    assert metrics["bandwidth_share"].value == pytest.approx(metrics["bandwidth"].value / 10)


def test_an_unknown_ceiling_is_null_not_a_guess():
    metrics = bandwidth_metrics(priced("cuda"), 0.002, [1_000_000])
    assert metrics["bandwidth_ceiling"].value is None and metrics["bandwidth_share"].value is None
    assert metrics["bandwidth"].value > 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rounds": 0}, "'rounds' of task 'speed' is 0"),
        ({"concurrency": (1, 1)}, "different whole numbers"),
        ({"concurrency": (0,)}, "different whole numbers"),
        ({"prompt": 2040, "tokens": 64}, "make prompt smaller"),
    ],
)
def test_impossible_settings_are_refused(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        run(ScriptedEngine(), **options)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ConfigError, match="name a longer text"):
        run(ScriptedEngine(), text=str(tmp_path / "short.txt"))


def test_quantiles_interpolate():
    assert quantile([1, 2, 3, 4, 5], 0.5) == median([5, 3, 1, 2, 4]) == 3
    assert quantile([0, 10], 0.95) == pytest.approx(9.5)
    assert quantile([7], 0.95) == 7
