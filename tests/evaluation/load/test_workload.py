"""Arrivals, lengths, prompts and bounds: what is asked, and when."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics

import pytest

from trimtab.errors import ConfigError
from trimtab.evaluation.load.arrivals import poisson
from trimtab.evaluation.load.lengths import LengthMix
from trimtab.evaluation.load.measure import parse_rates
from trimtab.evaluation.load.prompts import Form, Workload, read_prompts
from trimtab.evaluation.load.slo import Slo, parse_duration

TEXT = " ".join(f"word{i}" for i in range(2000))


def workload(prompts=None, context=512, mix=None):
    return Workload(mix or LengthMix(), context, 4.0, TEXT, prompts)


def test_arrivals_are_a_poisson_process():
    times = poisson(50.0, 400.0, random.Random(1))
    assert times == sorted(times) and times[0] > 0 and times[-1] < 400
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    # Exponential: the deviation is as large as the mean, and a share 1/e of the gaps is longer than it.
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.02)
    counts = [sum(t <= at < t + 1 for at in times) for t in range(400)]
    assert statistics.variance(counts) == pytest.approx(50, rel=0.25)


def test_arrivals_follow_the_seed():
    assert poisson(5.0, 9.0, random.Random(3)) == poisson(5.0, 9.0, random.Random(3))
    assert poisson(5.0, 9.0, random.Random(3)) != poisson(5.0, 9.0, random.Random(4))


def test_lengths_have_the_medians_and_the_published_means():
    rng = random.Random(0)
    drawn = [LengthMix().draw(rng, 1_000_000) for _ in range(20_000)]
    prompts, outputs = zip(*drawn, strict=True)
    assert statistics.median(prompts) == pytest.approx(69, rel=0.05)
    assert statistics.median(outputs) == pytest.approx(225, rel=0.05)
    assert statistics.mean(prompts) == pytest.approx(161, rel=0.06)
    assert statistics.mean(outputs) == pytest.approx(338, rel=0.06)


def test_lengths_shrink_with_the_context_and_fit_into_it():
    rng = random.Random(0)
    drawn = [LengthMix().draw(rng, 256) for _ in range(5000)]
    assert all(p >= 1 and o >= 1 and p + o <= 256 for p, o in drawn)
    assert statistics.median(p for p, _ in drawn) == pytest.approx(69 / 8, rel=0.1)


def test_lengths_are_read():
    assert LengthMix.parse("prompt=200,output_sigma=0") == LengthMix(prompt=200, output_sigma=0)
    assert LengthMix.parse("") == LengthMix()


@pytest.mark.parametrize("text", ["promt=3", "prompt=x", "prompt=0", "output_sigma=-1", "prompt=nan"])
def test_wrong_lengths_are_refused(text):
    with pytest.raises(ConfigError, match="--lengths has"):
        LengthMix.parse(text)


def test_a_bound_is_kept_or_not():
    slo = Slo.parse("ttft=200ms, itl=0.05s")
    assert slo.bounds == (("ttft", 0.2), ("itl", 0.05))
    assert slo.kept({"ttft": 0.2, "itl": 0.05}) and slo.kept({"ttft": 0.1, "itl": None})
    assert not slo.kept({"ttft": 0.2001, "itl": 0.01}) and not slo.kept({"ttft": 0.1, "itl": 0.06})
    assert str(slo) == "ttft <= 200 ms, itl <= 50 ms"


@pytest.mark.parametrize("text", ["", "ttf=1s", "ttft=fast", "ttft=0s", "ttft"])
def test_wrong_bounds_are_refused(text):
    with pytest.raises(ConfigError, match="--slo"):
        Slo.parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("200ms", 0.2), ("1.5s", 1.5), ("2m", 120), ("30", 30), ("5us", 5e-6)]
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text, "--duration") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1s", "1h", "abc", "1e3", "inf"])
def test_wrong_durations_are_refused(text):
    with pytest.raises(ConfigError, match="--duration is"):
        parse_duration(text, "--duration")


def test_rates_are_read():
    assert parse_rates("auto") is None
    assert parse_rates("1,2.5") == (1.0, 2.5)
    for wrong in ("", "1,,2", "0", "-1", "fast", "inf", "nan"):
        with pytest.raises(ValueError, match="--rates is"):
            parse_rates(wrong)


def test_prompts_are_read_from_both_forms(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"question_id": 1, "turns": ["first", "second"]}, {"prompt": "plain"}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert read_prompts(file) == ["first", "plain"]


@pytest.mark.parametrize("line", ["{", '{"turns": []}', '{"prompt": 3}', '{"prompt": " "}', "[1]", '"x"'])
def test_a_line_without_a_prompt_is_named(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2 of"):
        read_prompts(file)


def test_a_missing_empty_or_binary_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "p.jsonl").write_bytes(b"\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prompts(tmp_path / "p.jsonl")


def test_passages_have_the_drawn_lengths_and_fit():
    asks = list(itertools.islice(workload().draw(5), 300))
    assert asks == list(itertools.islice(workload().draw(5), 300))
    assert len({ask.text[:30] for ask in asks}) > 250  # each from another place: nothing to share
    for ask in asks:
        assert len(ask.text) <= 4 * ask.prompt_tokens
        assert ask.max_tokens >= 1
        assert 1.2 * ask.prompt_tokens + ask.max_tokens <= 512


def test_prompts_that_do_not_fit_are_left_out():
    prompts = ("short one", "x" * 4000, "another")
    load = workload(prompts)
    asks = list(itertools.islice(load.draw(1), 8))
    assert {ask.text for ask in asks} == {"short one", "another"}
    assert len(load.fitting()) == 2
    with pytest.raises(ConfigError, match="none of the 1 prompts fits into the context of 512"):
        next(workload(("x" * 4000,)).draw(1))


def test_bodies_speak_the_server_s_language():
    ask = next(workload(("Hello é",)).draw(0))
    body = json.loads(Form("m", chat=True).body(ask))
    assert body["messages"] == [{"role": "user", "content": "Hello é"}]
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
    assert body["ignore_eos"] and body["return_token_ids"]
    plain = json.loads(Form("m", chat=False, plain=True).body(ask))
    assert set(plain) == {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert Form("m", chat=True).path == "/v1/chat/completions"
