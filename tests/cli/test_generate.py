"""`trimtab generate` on the shipped model."""

from __future__ import annotations

import json
import re

import pytest

import trimtab
from trimtab.cli.generate import describe
from trimtab.engine.request import RequestMetrics
from trimtab.models.hub import SHIPPED

GREEDY = ["--temperature", "0", "--max-tokens", "12", "--backend", "torch"]


@pytest.fixture(scope="module")
def engine():
    return trimtab.Engine(backend="torch")


@pytest.fixture(scope="module")
def expected(engine):
    params = trimtab.SamplingParams(temperature=0, max_tokens=12)
    return engine.generate("The ship had been at sea", params)[0]


def test_text_goes_to_stdout_and_measurements_to_stderr(trimtab_cli, expected):
    result = trimtab_cli("generate", "The ship had been at sea", *GREEDY)
    assert result.exit_code == 0
    assert result.stdout == expected.text + "\n"
    assert result.stderr.startswith(f"{len(expected.token_ids)} tokens at ")
    assert "KV cache" in result.stderr


def test_echo_puts_the_prompt_in_front(trimtab_cli, expected):
    result = trimtab_cli("generate", "The ship had been at sea", "--echo", *GREEDY)
    assert result.stdout == f"The ship had been at sea{expected.text}\n"


@pytest.mark.parametrize("words", [[], ["-"], [str(SHIPPED / "tiny")], [str(SHIPPED / "tiny"), "-"]])
def test_the_prompt_may_come_from_a_pipe(trimtab_cli, expected, words):
    result = trimtab_cli("generate", *words, *GREEDY, stdin="The ship had been at sea\n")
    assert result.stdout == expected.text + "\n"


def test_two_words_are_model_and_prompt(trimtab_cli, expected):
    other = trimtab_cli("generate", str(SHIPPED / "draft"), "The ship had been at sea", *GREEDY)
    assert other.exit_code == 0
    assert other.stdout != expected.text + "\n"
    assert f"loading {SHIPPED / 'draft'}" in other.stderr


def test_json_is_one_record_with_everything(trimtab_cli, expected):
    result = trimtab_cli(
        "generate", "The ship had been at sea", *GREEDY, "--json", "--logprobs", "2", "--prompt-logprobs", "1"
    )
    record = json.loads(result.stdout)
    output = record["outputs"][0]
    assert (output["text"], output["token_ids"]) == (expected.text, expected.token_ids)
    assert record["prompt_token_ids"] == expected.prompt_token_ids
    assert record["plan"]["cache"]["name"] == "full" and record["backend"] == "torch"
    assert [len(entry["top"]) for entry in output["logprobs"]] == [2] * len(expected.token_ids)
    assert len(record["prompt_logprobs"]) == len(expected.prompt_token_ids)
    assert output["metrics"]["completion_tokens"] == len(expected.token_ids)
    assert "arrival" not in output["metrics"]


def test_several_completions_are_numbered(trimtab_cli):
    words = ["generate", "The", "-n", "2", "--best-of", "3", "--max-tokens", "5", "--seed", "1"]
    result = trimtab_cli(*words, "--backend", "torch")
    assert result.stdout.startswith("[1]") and "\n[2]" in result.stdout
    assert "in 2 completions" in result.stderr
    assert result.stdout == trimtab_cli(*words, "--backend", "torch").stdout


def test_chat_frames_the_prompt(trimtab_cli):
    question = "Write as JSON: In Oslo lives Paul Fox, a tailor aged 81."
    words = ["generate", "--chat", question, "--temperature", "0", "--backend", "torch", "--max-tokens", "60"]
    answer = json.loads(trimtab_cli(*words).stdout)
    assert answer == {"name": "Paul Fox", "age": 81, "city": "Oslo", "job": "tailor"}
    told = json.loads(trimtab_cli(*words, "--system", "Be brief.", "--json").stdout)
    plain = json.loads(trimtab_cli(*words, "--json").stdout)
    assert len(told["prompt_token_ids"]) > len(plain["prompt_token_ids"])


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        (["--choice", "yes", "--choice", "no"], lambda text: text in ("yes", "no")),
        (["--regex", "[a-c]{5}"], lambda text: re.fullmatch("[a-c]{5}", text)),
        (["--grammar", 'start: "ha"{3}'], lambda text: text == "hahaha"),
        (["--json-schema", '{"enum": [[1, 2], [3]]}'], lambda text: json.loads(text) in ([1, 2], [3])),
        (["--json-schema", "schema.json"], lambda text: json.loads(text) == {"a": True}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_text_keeps_to_a_form(trimtab_cli, monkeypatch, tmp_path, words, fits):
    monkeypatch.chdir(tmp_path)
    schema = {"properties": {"a": {"const": True}}, "required": ["a"], "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", **schema}))
    result = trimtab_cli("generate", "The ship", *words, "--backend", "torch", "--seed", "1")
    assert result.exit_code == 0, result.stderr
    assert fits(result.stdout.removesuffix("\n"))


def test_every_sampling_option_arrives(trimtab_cli, monkeypatch):
    seen = {}

    def remember(self, prompt, params):
        seen["params"] = params
        raise trimtab.TrimtabError("seen")

    monkeypatch.setattr(trimtab.Engine, "generate", remember)
    words = (
        "--max-tokens 9 --min-tokens 2 --temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --seed 3 -n 2 "
        "--best-of 4 --stop a --stop b --stop-token-id 5 --ignore-eos --presence-penalty 0.1 "
        "--frequency-penalty 0.2 --repetition-penalty 1.3 --logit-bias 42=-5 --logprobs 1 "
        "--prompt-logprobs 2 --keep-special-tokens --json"
    )
    trimtab_cli("generate", "x", *words.split())
    assert seen["params"] == trimtab.SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        n=2,
        best_of=4,
        stop=["a", "b"],
        stop_token_ids=[5],
        ignore_eos=True,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.3,
        logit_bias={42: -5.0},
        logprobs=1,
        prompt_logprobs=2,
        skip_special_tokens=False,
    )


def test_every_plan_option_arrives_and_wins_over_the_plan(trimtab_cli, monkeypatch, tmp_path):
    seen = {}

    def remember(self, model=None, *, wait_for_kernels=True, **options):
        seen.update(options, wait=wait_for_kernels)
        raise trimtab.TrimtabError("seen")

    monkeypatch.setattr(trimtab.Engine, "__init__", remember)
    file = tmp_path / "plan.yaml"
    file.write_text("max_batch: 4\nthreads: 2\ndtype: bfloat16\n")
    words = "--cache full --dtype fp32 --device cpu --threads 1 --kv-memory 64MiB --backend torch"
    trimtab_cli("generate", "some/model", "x", "--plan", str(file), *words.split())
    assert seen["plan"] == trimtab.Plan(
        "some/model",
        max_batch=4,
        dtype="float32",
        device="cpu",
        threads=1,
        kv_memory=64 * 2**20,
        backend="torch",
    )
    assert seen["wait"] is False


def test_the_line_of_measurements_copes_with_a_single_token():
    none = RequestMetrics(prompt_tokens=3)
    assert describe([none]) == "0 tokens, prompt of 3, KV cache 0 B"
    one = RequestMetrics(prompt_tokens=3, completion_tokens=1, ttft_s=0.5, token_times=[0.5])
    one.cached_prompt_tokens = 2
    assert describe([one]) == "1 token, first after 0.50 s, prompt of 3 (2 cached), KV cache 0 B"
