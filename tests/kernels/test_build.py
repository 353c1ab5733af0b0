"""Building the kernels: without a working compiler or cache folder everything runs on torch, and says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import trimtab
from kernels.libraries import native_kernels
from trimtab.errors import PlanError
from trimtab.kernels import build
from trimtab.models.shapes import random_model, shape
from trimtab.models.transformer import Model

TINY = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(shape("125m", **TINY, vocab_size=64, max_position_embeddings=64))


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty kernel cache; the choice of compiler is made anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (build.compiler, build._key):
        cached.cache_clear()
    yield tmp_path
    for cached in (build.compiler, build._key):
        cached.cache_clear()


@pytest.fixture
def no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    return fresh


def broken_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = folder / "broken-cxx"
    script.write_text("#!/bin/sh\necho 'internal compiler error: out of luck' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


def answers(model: Model, **options: object) -> tuple[str, list[int]]:
    engine = trimtab.Engine(model, threads=1, max_batch=2, **options)
    params = trimtab.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    return engine.backend, engine.generate([[5, 6, 7]], params)[0].token_ids


def test_without_a_compiler_torch_does_the_work(
    no_compiler: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    assert build.compiler() is None and build.build("float32") is None
    with caplog.at_level(logging.INFO, "trimtab"):
        backend, tokens = answers(model)
    assert backend == "torch" and len(tokens) == 4
    assert "install a C++ compiler" in caplog.text


def test_asking_for_native_without_a_compiler_is_one_clear_sentence(no_compiler: Path, model: Model) -> None:
    with pytest.raises(PlanError) as error:
        answers(model, backend="native")
    assert len(error.value.reasons) == 1
    assert str(error.value).count("\n") == 0
    assert "backend=native" in str(error.value) and "install a C++ compiler" in str(error.value)


def test_a_broken_compiler_is_reported_and_leaves_nothing(
    fresh: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken_compiler(fresh, monkeypatch)
    backend, _ = answers(model)
    assert backend == "torch"
    assert "out of luck" in caplog.text and "plain torch" in caplog.text
    assert list(build.cache_folder().iterdir()) == []
    with pytest.raises(PlanError, match="backend=native"):
        answers(model, backend="native")


def test_a_cache_folder_that_cannot_be_written(
    fresh: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if build.compiler() is None:
        pytest.skip("no C++ compiler: the cache folder is never written")
    (fresh / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    backend, _ = answers(model)
    assert backend == "torch"
    assert "cannot write the kernel cache" in caplog.text


def test_cxx_is_asked_first(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = broken_compiler(fresh, monkeypatch)
    assert build.compiler() == str(script)


def test_another_compiler_or_other_sources_make_another_file(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.library_path("float32")
    broken_compiler(fresh, monkeypatch)
    build.compiler.cache_clear()
    build._key.cache_clear()
    second = build.library_path("float32")
    sources = fresh / "cpu"
    sources.mkdir()
    (sources / "trimtab.cpp").write_text("// other")
    monkeypatch.setattr(build, "SOURCE", sources)
    build._key.cache_clear()
    assert len({first, second, build.library_path("float32")}) == 3


def test_both_backends_agree_on_tokens(model: Model) -> None:
    native_kernels()
    assert answers(model, backend="native") == ("native", answers(model, backend="torch")[1])


@pytest.mark.parametrize(
    "changes,dtype,reason",
    [
        (dict(num_attention_heads=8), "float32", "head size"),
        (dict(), "float64", "float64"),
    ],
)
def test_models_the_kernels_cannot_run(changes: dict[str, int], dtype: str, reason: str) -> None:
    made = random_model(shape("125m", **(TINY | changes), vocab_size=64, max_position_embeddings=64))
    made = made.to(getattr(torch, dtype))
    assert answers(made)[0] == "torch"
    with pytest.raises(PlanError, match=reason):
        answers(made, backend="native")


def test_a_mixture_of_experts_runs_on_torch() -> None:
    from trimtab.models.config import config_from_dict

    raw = dict(shape("125m", **TINY, vocab_size=64, max_position_embeddings=64).raw)
    raw |= dict(
        architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=2, num_experts_per_tok=1
    )
    made = random_model(config_from_dict(raw))
    assert answers(made)[0] == "torch"
    with pytest.raises(PlanError, match="experts"):
        answers(made, backend="native")


def test_processes_that_start_together_compile_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, calls = fresh / "slow-cxx", fresh / "calls"
    script.write_text(f"#!/bin/sh\necho x >> {calls}\nsleep 0.2\nfor last; do :; done\necho built > $last\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    folder = build.library_path("float32").parent
    folder.mkdir(parents=True)
    left = folder / f"{build.library_path('float32').stem}-dead.tmp"  # of a build that was killed
    left.touch()
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(build.build, ["float32"] * 4))
    assert paths == [build.library_path("float32")] * 4
    assert calls.read_text() == "x\n"
    assert not left.exists()
