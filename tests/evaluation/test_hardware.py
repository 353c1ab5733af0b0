import json

import torch

from trimtab import hardware
from trimtab.evaluation.provenance import commit, provenance


def test_description_is_plain_and_names_the_essentials():
    found = hardware.describe()
    json.dumps(found)
    assert found["cores"] >= 1 and found["torch"] == torch.__version__
    assert {"cpu", "ram_gb", "os", "python", "numpy", "threads", "gpu"} <= set(found)


def test_rates_are_measured_once_per_setting_and_threads_are_put_back():
    before = torch.get_num_threads()
    small = hardware.read_bandwidth(1, size=2**20)
    assert 0.05 < small < 100_000
    assert hardware.read_bandwidth(1, size=2**20) == small
    rate = hardware.matmul_rate("float32", 1)
    assert 0.05 < rate < 1e6
    assert hardware.matmul_rate("float32", 1) == rate
    assert torch.get_num_threads() == before


def test_the_probe_without_kernels_reads_with_torch(monkeypatch):
    monkeypatch.setattr("trimtab.kernels.build.is_built", lambda dtype: False)
    assert hardware._native_reader(1) is None
    hardware._read_bandwidth.cache_clear()
    assert hardware.read_bandwidth(1, size=2**20) > 0


def test_best_time_is_the_fastest_of_long_enough_timings(monkeypatch):
    clock = {"now": 0.0}
    costs = iter([1e-3] * 20 + [5e-3] * 20 + [0.5e-3] * 10_000)

    def work():
        clock["now"] += next(costs)

    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock["now"])
    assert abs(hardware._best_seconds(work) - 0.5e-3) < 1e-6


def test_provenance_says_where_a_number_came_from():
    found = provenance(seed=3)
    json.dumps(found)
    assert found["seed"] == 3 and found["versions"]["torch"] == torch.__version__
    assert found["date"].endswith("+00:00")
    assert "cpu" in found["hardware"] and isinstance(found["command"], list)


def test_no_commit_is_claimed_outside_a_checkout(monkeypatch, tmp_path):
    import trimtab.evaluation.provenance as module

    monkeypatch.setattr(module, "__file__", str(tmp_path / "provenance.py"))
    assert commit() is None
