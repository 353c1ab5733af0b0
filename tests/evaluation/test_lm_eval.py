"""trimtab under lm-evaluation-harness: its settings, its requests, and agreement with the `hf` backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import trimtab
from trimtab.errors import ConfigError, OutputError, RequestError
from trimtab.evaluation.harness import hook
from trimtab.evaluation.harness.requests import fitted_pair, fitted_prompt, sampling_params, stop_texts
from trimtab.evaluation.harness.settings import HarnessSettings, merged
from trimtab.models.hub import find_folder
from trimtab.plan import Plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHIPPED = str(find_folder(None))

# --- settings


@pytest.mark.parametrize(
    ("args", "plan"),
    [
        ({}, Plan()),
        ({"pretrained": "a/b", "dtype": "float32"}, Plan("a/b", dtype="float32")),
        ({"model": "a/b"}, Plan("a/b")),
        # The harness splits at every comma and turns words into numbers.
        (
            {"cache": "kivi:bits=4", "residual": 64, "threads": 1},
            Plan(cache="kivi:bits=4,residual=64", threads=1),
        ),
        (
            {"cache": "snapkv:budget=25%+kivi:bits=4", "residual": 64},
            Plan(cache="snapkv:budget=25%+kivi:bits=4,residual=64"),
        ),
        ({"cache": {"name": "kivi", "options": {"bits": 4}}}, Plan(cache="kivi:bits=4")),
        (
            {"plan": "cache=kivi:bits=4 dtype=float32", "max_batch": 3},
            Plan(cache="kivi:bits=4", dtype="float32", max_batch=3),
        ),
        ({"batch_size": "8"}, Plan(max_batch=8)),
        ({"batch_size": 8, "max_batch": 2}, Plan(max_batch=2)),
        ({"batch_size": "auto:4"}, Plan()),
        ({"batch_size": "auto", "max_batch_size": 5}, Plan(max_batch=5)),
        ({"batch_size": 2, "max_batch_size": 5}, Plan(max_batch=2)),
    ],
)
def test_model_args_are_a_plan(args: dict[str, Any], plan: Plan) -> None:
    assert HarnessSettings.from_args(args).plan == plan


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"cahce": "full"}, "unknown model_args setting 'cahce'. Did you mean 'cache'"),
        ({"cache": "kivi:bits=4", "resdual": 64}, "unknown model_args setting 'resdual'"),
        ({"cache": "kivi:bits=5"}, "bits"),
        ({"pretrained": "a/b", "model": "c/d"}, "both 'pretrained' and 'model'"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_gen_toks": True}, "max_gen_toks is True"),
        ({"add_bos_token": "maybe"}, "add_bos_token is 'maybe'"),
        ({"chat_template_args": "x"}, "chat_template_args is 'x'"),
        ({"enable_thinking": True}, "think_end_token is not given"),
    ],
)
def test_wrong_model_args_are_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HarnessSettings.from_args(args)


def test_settings_of_the_adapter() -> None:
    settings = HarnessSettings.from_args(
        {"max_length": "512", "prefix_token_id": 0, "enable_thinking": False, "think_end_token": "7"}
    )
    assert (settings.max_length, settings.prefix_token_id, settings.think_end_token) == (512, 0, 7)
    assert settings.chat_template_args == {"enable_thinking": False}


def test_the_harness_default_device_means_the_cpu_where_there_is_no_other() -> None:
    assert merged({}, {"device": "cuda:0", "batch_size": 1, "max_batch_size": None}, False) == {
        "batch_size": 1
    }
    assert merged({}, {"device": "cuda:0"}, True) == {"device": "cuda:0"}
    assert merged({"device": "cuda:1", "batch_size": 4}, {"device": "cuda:0", "batch_size": 1}, False) == {
        "device": "cuda:1",
        "batch_size": 4,
    }


# --- requests


@pytest.mark.parametrize(
    ("generation", "temperature"),
    [
        ({}, 0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": False, "temperature": 0.7}, 0),
        ({"do_sample": True}, 1),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
        ({"do_sample": None, "temperature": None}, 0),
    ],
)
def test_sampling_is_what_the_harness_means(generation: dict[str, Any], temperature: float) -> None:
    assert sampling_params(generation, 256, seed=1).temperature == temperature


def test_generation_arguments_reach_the_engine() -> None:
    params = sampling_params(
        {"until": ["\n", ""], "stop": "Q:", "max_new_tokens": 9, "max_gen_toks": 5, "top_p": 0.9, "top_k": 4},
        256,
        3,
    )
    assert (params.max_tokens, params.top_p, params.top_k, params.seed) == (5, 0.9, 4, 3)
    assert params.stop is not None and list(params.stop) == ["\n", "Q:"]
    assert sampling_params({}, 256, 3).max_tokens == 256
    assert stop_texts({"until": None}) == []


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temprature": 1}, "unknown generation argument 'temprature'. Did you mean 'temperature'"),
        ({"num_beams": 4}, "num_beams is 4"),
        ({"until": [3]}, "until is"),
        ({"top_p": 2}, "top_p is 2"),
    ],
)
def test_wrong_generation_arguments_are_named(generation: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sampling_params(generation, 256, seed=1)


def test_long_texts_lose_their_beginning() -> None:
    assert fitted_pair([1, 2, 3], [4, 5], 10) == ([1, 2, 3], [4, 5])
    assert fitted_pair([1, 2, 3], [4, 5], 4) == ([1, 2, 3], [4, 5])  # the 5 is predicted, not read
    assert fitted_pair([1, 2, 3], [4, 5], 3) == ([2, 3], [4, 5])
    assert fitted_pair([1, 2, 3], [4, 5], 2) == ([3], [4, 5])
    with pytest.raises(RequestError, match="continuation has 2 tokens"):
        fitted_pair([1, 2, 3], [4, 5], 1)
    assert fitted_prompt([1, 2, 3], 5, 3) == [2, 3]
    with pytest.raises(RequestError, match="max_gen_toks is 5"):
        fitted_prompt([1, 2, 3], 5, 5)


def test_a_text_may_be_scored_up_to_one_token_beyond_the_context() -> None:
    """The harness's windows need it: the last token is predicted from a full context."""
    engine = trimtab.Engine(trimtab.load(dtype="float32"), max_batch=1)
    limit = engine.model.config.context_length
    ids = [7 * i % 4000 + 8 for i in range(limit + 2)]
    scored = engine.score([(ids[:-2], ids[-2:-1])])[0]
    assert len(scored.logprobs) == 1 and scored.logprobs[0] < 0
    with pytest.raises(RequestError, match=f"has {limit + 2} tokens"):
        engine.score([(ids[:-2], ids[-2:])])


# --- the hook for plain `lm_eval`


def test_the_hook_costs_nothing_but_a_name(tmp_path: Path) -> None:
    """In a stand-in harness: the name is there once its models are, and trimtab is not imported for it."""
    site, package = tmp_path / "site", tmp_path / "site" / "lm_eval"
    (package / "api").mkdir(parents=True)
    for file in (package / "__init__.py", package / "api" / "__init__.py"):
        file.write_text("")
    (package / "api" / "registry.py").write_text(
        "class R(dict):\n    def register(self, name, target): self[name] = target\nmodel_registry = R()\n"
    )
    (package / "models.py").write_text("from lm_eval.api.registry import model_registry as r\nr['hf'] = 1\n")
    written = hook.install(site)
    assert {file.name for file in written} == {"_trimtab_lm_eval.py", "_trimtab_lm_eval.pth"}
    program = (
        "import site, sys; before = set(sys.modules); site.addsitedir(sys.argv[1])\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "print(sorted(set(sys.modules) - before))\n"
        "import json, lm_eval.models; from lm_eval.api.registry import model_registry\n"
        "print(dict(model_registry), any(m.startswith('trimtab') for m in sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-S", "-c", program, str(site)], capture_output=True, text=True, check=True
    )
    imported, names = shown.stdout.splitlines()
    assert imported == "['_trimtab_lm_eval']"
    assert names == "{'hf': 1, 'trimtab': 'trimtab.evaluation.harness.model:TrimtabLM'} False"
    assert shown.stderr == ""
    assert set(hook.remove(site)) == set(written) and hook.remove(site) == []
    with pytest.raises(OutputError, match="cannot write into"):
        hook.install(tmp_path / "nowhere")


# --- with the harness


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """Before the harness's libraries are imported: they read these once."""
    before = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    yield
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="module")
def lm(offline: None) -> Any:
    pytest.importorskip("lm_eval")
    from trimtab.evaluation.lm_eval import TrimtabLM

    return TrimtabLM.create_from_arg_string(
        f"pretrained={SHIPPED},dtype=float32,cache=kivi:bits=4,residual=32"
    )


def ask(*args: Any) -> Any:
    return SimpleNamespace(args=args, task_name="t")


@pytest.mark.slow
def test_tokens_are_the_hf_backends(lm: Any) -> None:
    bos = lm.text.bos_id
    assert lm.prefix_token_id == bos and lm.eot_token_id == 2
    assert lm.tok_encode("Hello")[0] == bos
    assert lm.tok_encode("<|bos|>Hello") == lm.tok_encode("Hello")
    assert lm.tok_encode("Hello", add_special_tokens=False) == lm.tok_encode("Hello")[1:]
    chat = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert chat == "<|bos|><|user|>Hi<|end|><|assistant|>"
    assert lm.apply_chat_template([{"role": "assistant", "content": "Hi"}], False) == "<|bos|><|assistant|>Hi"
    assert "m['role']" in lm.chat_template(True) and lm.chat_template(False) is None


@pytest.mark.slow
def test_special_stop_texts_and_seeds(lm: Any) -> None:
    long = {"max_gen_toks": 12, "ignore_eos": True}
    (whole,) = lm.generate_until([ask("The old house stood", long)])
    (cut,) = lm.generate_until([ask("The old house stood", {**long, "until": whole[5:8]})])
    assert cut == whole[:5]
    sampled = {**long, "temperature": 1.0, "seed": 4}
    first = lm.generate_until([ask("The old house stood", sampled)] * 3)
    assert len(set(first)) == 3
    assert lm.generate_until([ask("The old house stood", sampled)] * 3) == first


@pytest.mark.slow
def test_an_engine_is_measured_as_it_is(lm: Any) -> None:
    from trimtab.evaluation.lm_eval import TrimtabLM

    same = TrimtabLM(lm.engine)
    pairs = [
        ask("The old house", " stood"),
        ask("", "A"),
        ask("The old house", " fell down"),
        ask("The ", "cat"),
    ]
    assert same.loglikelihood(pairs, disable_tqdm=True) == lm.loglikelihood(pairs, disable_tqdm=True)
    info = same.get_model_info()
    assert info["trimtab_plan"] == str(lm.engine.plan) and info["trimtab_kv_bytes_peak_of_one_request"] > 0
    with pytest.raises(ConfigError, match="an engine is given and 'cache' besides"):
        TrimtabLM(lm.engine, cache="full")
    with pytest.raises(ConfigError, match="max_length is 4096 and the model's context is 2048"):
        TrimtabLM(lm.engine, max_length=4096)


@pytest.mark.slow
def test_agreement_with_the_hf_backend(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer to every kind of request, texts longer than the context among them, and every metric."""
    for package in ("lm_eval", "transformers", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lm_eval_agreement as benchmark

    results = benchmark.run_all(documents=4, threads=1)
    _, claims, record = benchmark.compare(results)
    assert [claim.line() for claim in claims if not claim.met] == []
    samples = results["trimtab"]["samples"]
    flags = [bool(a[1]) for a in benchmark._answers(results["trimtab"], "offline_last_word")]
    assert True in flags and False in flags
    assert all(len(answers) >= 3 for answers in samples.values())
    json.dumps(record)


@pytest.mark.slow
def test_the_command_line_is_the_harness_own(offline: None) -> None:
    pytest.importorskip("lm_eval")
    command = [sys.executable, "-m", "trimtab.evaluation.lm_eval"]
    run = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "lm-eval" in run.stdout
    wrong = ["--model", "trimtab", "--model_args", "cahce=full", "--tasks", "wikitext"]
    run = subprocess.run([*command, *wrong], capture_output=True, text=True)
    assert run.returncode == 2 and "Did you mean 'cache'" in run.stderr.splitlines()[-1]
