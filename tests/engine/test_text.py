"""Where a text ends and how it is streamed; the tokens are scripted, the tokenizer is the shipped one."""

from __future__ import annotations

import pytest

from engine.fakes import scripted_engine
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.engine.engine import Engine
from trimtab.engine.request import Completion, Piece
from trimtab.errors import RequestError

STORY = "The whale rose. “Mönsieur,” said Ann 😀 Lee, “你好 and good night!” Then all was still"


def ask(engine: Engine, **params: object) -> tuple[Completion, list[Piece]]:
    """The whole answer, and the same streamed."""
    settings = SamplingParams(**({"temperature": 0.0, "max_tokens": 200} | params))  # type: ignore[arg-type]
    [out] = engine.generate([[10, 11]], settings)
    pieces = list(engine.stream([10, 11], settings))
    assert "".join(p.text for p in pieces) == out.text
    assert [t for p in pieces for t in p.token_ids] == out.token_ids
    assert pieces[-1].finish_reason == out.finish_reason and pieces[-1].metrics is not None
    assert all(p.finish_reason is None and p.metrics is None for p in pieces[:-1])
    assert not any("\ufffd" in p.text for p in pieces), "half a character was shown"
    return out.outputs[0], pieces


def test_a_text_ends_at_its_length() -> None:
    engine, script = scripted_engine(STORY)
    out, pieces = ask(engine, max_tokens=len(script))
    assert (out.text, out.token_ids, out.finish_reason) == (STORY, script, "length")
    assert len(pieces) > 10


def test_characters_that_never_complete_are_replaced_at_the_end() -> None:
    """The script is cut inside the emoji, which is several tokens."""
    engine, script = scripted_engine(STORY)
    assert engine.model.tokenizer is not None
    cut = next(
        n for n in range(1, len(script)) if engine.model.tokenizer.decode(script[:n]).endswith("\ufffd")
    )
    params = SamplingParams(temperature=0, max_tokens=cut)
    [out] = engine.generate([[10, 11]], params)
    assert out.text == engine.model.tokenizer.decode(script[:cut])
    assert "".join(p.text for p in engine.stream([10, 11], params)) == out.text


@pytest.mark.parametrize(
    "stop,met",
    [
        (["said Ann"], "said Ann"),
        (["nn 😀 Le"], "nn 😀 Le"),
        (["ö"], "ö"),
        (["never met", "good night"], "good night"),
        (["Ann 😀 Lee", "Ann"], "Ann"),
        (["night!” Then all was still and"], None),
        (["still"], "still"),
    ],
    ids=str,
)
@pytest.mark.parametrize("include", [False, True])
def test_stop_texts_across_token_borders(stop: list[str], met: str | None, include: bool) -> None:
    engine, script = scripted_engine(STORY)
    out, pieces = ask(engine, stop=stop, include_stop_str_in_output=include, max_tokens=len(script))
    expected = STORY if met is None else STORY[: STORY.index(met)] + (met if include else "")
    assert out.text == expected
    assert out.finish_reason == ("length" if met is None else "stop")
    assert out.stop_reason == met
    if met and not include:
        assert not any(met in p.text for p in pieces)


def test_a_beginning_of_a_stop_text_is_held_back_only_while_it_may_come() -> None:
    engine, script = scripted_engine("aa bb cc dd")
    _, pieces = ask(engine, stop=["bb cx"], max_tokens=len(script))
    assert "".join(p.text for p in pieces) == "aa bb cc dd"
    shown = ""
    for piece in pieces[:-1]:
        shown += piece.text
        assert not shown.endswith((" b", "bb", "bb c"))


def test_end_tokens() -> None:
    engine, script = scripted_engine("so be it", end=2)
    out, _ = ask(engine)
    assert out.token_ids == [*script, 2] and out.text == "so be it"
    assert out.finish_reason == "stop" and out.stop_reason is None
    out, _ = ask(engine, ignore_eos=True, max_tokens=len(script) + 3)
    assert out.finish_reason == "length" and out.text == "so be it.."
    out, _ = ask(engine, skip_special_tokens=False)
    assert out.text == "so be it" + str(engine.model.tokenizer.id_to_token(2))  # type: ignore[union-attr]


def test_every_end_token_of_the_tokenizer_counts() -> None:
    engine, _ = scripted_engine("x")
    assert engine.model.tokenizer is not None
    for end in engine.model.tokenizer.eos_ids:
        engine, script = scripted_engine("so be it", end=end)
        out, _ = ask(engine)
        assert out.finish_reason == "stop" and out.token_ids == [*script, end]


def test_stop_tokens() -> None:
    engine, script = scripted_engine("one two three four")
    third = script[2]
    out, _ = ask(engine, stop_token_ids=[third, 4000])
    assert out.token_ids == script[: script.index(third) + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", third)
    out, _ = ask(engine, stop_token_ids=[third], ignore_eos=True)
    assert out.finish_reason == "stop", "ignore_eos is about the model's own end tokens"


def test_min_tokens_forbids_ends_until_then() -> None:
    engine, script = scripted_engine("so be it", end=2)
    out, _ = ask(engine, min_tokens=len(script) + 1, max_tokens=len(script) + 5)
    assert out.token_ids[: len(script)] == script
    assert out.token_ids[len(script)] != 2 and len(out.token_ids) > len(script) + 1
    out, _ = ask(engine, min_tokens=len(script))
    assert out.token_ids == [*script, 2]
    out, _ = ask(engine, min_tokens=4, stop_token_ids=[script[1]])
    assert script[1] not in out.token_ids[:4]


def test_the_context_ends_a_text_without_max_tokens() -> None:
    engine, _ = scripted_engine("on and on")
    out, _ = ask(engine, max_tokens=None)
    assert out.finish_reason == "length" and len(out.token_ids) == 256 - 2
    assert len(engine.generate([[10, 11]], SamplingParams(max_tokens=400, temperature=0))[0].token_ids) == 254


def test_two_streams_at_once() -> None:
    engine, script = scripted_engine(STORY)
    params = SamplingParams(temperature=0, max_tokens=len(script))
    first, second = engine.stream([10, 11], params), engine.stream([12, 13], params)
    texts = ["", ""]
    for i, piece in enumerate([next(first), next(second), *list(first)]):
        texts[i == 1] += piece.text
    texts[1] += "".join(p.text for p in second)
    assert texts == [STORY, STORY]


def test_metrics_of_a_request() -> None:
    engine, script = scripted_engine("a short answer", end=2)
    [out] = engine.generate([[10, 11]], SamplingParams(temperature=0, max_tokens=50))
    m = out.metrics
    assert (m.prompt_tokens, m.completion_tokens) == (2, len(script) + 1)
    assert len(m.token_times) == m.completion_tokens and m.token_times == sorted(m.token_times)
    assert m.ttft_s == m.token_times[0] and 0 <= m.queue_s <= m.ttft_s
    assert m.kv_bytes_held == m.kv_bytes_peak == engine.cache.pool.page_bytes  # type: ignore[attr-defined]
    assert m.preemptions == 0 and m.tokens_per_s is not None and m.tokens_per_s > 0


def test_a_stream_is_of_one_text() -> None:
    engine, _ = scripted_engine("x")
    with pytest.raises(RequestError, match="a stream is of one text"):
        next(engine.stream([10, 11], SamplingParams(n=2)))
    assert not engine.scheduler.has_work


def test_prompts_as_text() -> None:
    engine, _ = scripted_engine("x")
    assert engine.model.tokenizer is not None
    [out] = engine.generate("Once upon", SamplingParams(max_tokens=2, temperature=0))
    assert out.prompt == "Once upon"
    assert out.prompt_token_ids == engine.model.tokenizer.encode("Once upon")
    [ids] = engine.generate(out.prompt_token_ids, SamplingParams(max_tokens=2, temperature=0))
    assert ids.prompt is None and ids.token_ids == out.token_ids
