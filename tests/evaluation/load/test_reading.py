"""From bytes and their times to tokens and theirs, and from these to the figures."""

from __future__ import annotations

import itertools
import json

import pytest

from evaluation.load.fake_server import event
from trimtab.evaluation.load.client import Exchange
from trimtab.evaluation.load.reading import Answer, events, read
from trimtab.evaluation.load.slo import Slo
from trimtab.evaluation.load.summary import quantiles, summarise

USAGE = {"prompt_tokens": 5, "completion_tokens": 4}


def exchange(*chunks, status=200, scheduled=10.0, begun=10.5, done=True):
    """Each chunk comes one second after the other, the first at 11."""
    parts = [(11.0 + i, event(chunk)) for i, chunk in enumerate(chunks)]
    parts += [(11.0 + len(chunks), event(b"[DONE]"))] if done else []
    return Exchange(scheduled, begun, parts[-1][0] if parts else 11.0, status, parts)


def text(*ids, **more):
    return {"choices": [{"text": "x", **({"token_ids": list(ids)} if ids else {})}], **more}


def test_times_count_from_the_schedule_and_tokens_from_their_ids():
    answer = read(exchange(text(1), text(2, 3, 4), {"choices": [], "usage": USAGE}), stream=True)
    assert answer.error is None
    assert (answer.lag, answer.ttft, answer.e2e) == (0.5, 1.0, 4.0)
    assert (answer.chunk_times, answer.chunk_tokens) == ([11.0, 12.0], [1.0, 3.0])
    assert answer.gaps == [1.0]
    assert answer.tpot == pytest.approx(1 / 3)
    assert (answer.prompt_tokens, answer.output_tokens, answer.counted) == (5, 4, True)


def test_running_usage_tells_the_tokens_too():
    chunks = [text(usage=USAGE | {"completion_tokens": n}) for n in (1, 3, 4)]
    answer = read(exchange(*chunks), stream=True)
    assert answer.chunk_tokens == [1.0, 2.0, 1.0]
    assert answer.counted


def test_without_either_the_total_is_spread_evenly_and_that_is_said():
    answer = read(exchange(text(), text(), {"choices": [], "usage": USAGE}), stream=True)
    assert answer.chunk_tokens == [2.0, 2.0]
    assert not answer.counted
    four = read(exchange(*[text()] * 4, {"choices": [], "usage": USAGE}), stream=True)
    assert four.chunk_tokens == [1.0] * 4 and four.counted
    unknown = read(exchange(text(), text()), stream=True)
    assert unknown.output_tokens == 2 and not unknown.counted


def test_a_chunk_without_text_is_no_token():
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    said = {"choices": [{"delta": {"content": "hi"}}]}
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": USAGE}
    assert read(exchange(role, said, end), stream=True).chunk_times == [12.0]


def test_an_empty_answer_is_no_error():
    answer = read(exchange({"choices": [], "usage": USAGE | {"completion_tokens": 0}}), stream=True)
    assert (answer.error, answer.ttft, answer.tpot, answer.chunk_tokens) == (None, None, None, [])


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (exchange(text(1), done=False), "the stream was cut off"),
        (exchange({"error": {"message": "no memory"}}), "in the stream: no memory"),
        (exchange(b"{"), "not the answer"),
        (exchange(b"[3]"), "not the answer"),
        (Exchange(0, 0, 1, 503), "503"),
        (Exchange(0, 0, 1, 429, [(0, b'{"error": {"message": "full"}}')]), "429: full"),
        (Exchange(0, 0, 1, 0, [], "connection lost"), "connection lost"),
    ],
)
def test_failures_are_told(what, error):
    assert read(what, stream=True).error.startswith(error)


def test_a_whole_answer_is_read():
    body = json.dumps({"usage": USAGE, "trimtab": {"queue_s": 0.1}}).encode()
    answer = read(Exchange(0.0, 0.0, 2.0, 200, [(1.0, body[:9]), (2.0, body[9:])]), stream=False)
    assert (answer.error, answer.output_tokens, answer.extras) == (None, 4, {"queue_s": 0.1})


def test_an_event_counts_when_it_is_whole():
    raw = b": hello\n\ndata: 1\r\n\r\ndata: 2\ndata: 3\n\ndata: rest"
    cuts = [0, 10, 18, 20, 36, len(raw)]
    parts = [(float(i), raw[a:b]) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
    assert list(events(parts)) == [(2.0, b"1"), (4.0, b"2\n3")]


def answer(scheduled, ttft, gaps, tokens, error=None, lag=0.0, counted=True):
    times = [scheduled + ttft]
    for gap in gaps:
        times.append(times[-1] + gap)
    return Answer(
        scheduled, lag, times[-1], error, times, [1.0, *map(float, tokens)], 10, 1 + sum(tokens), counted
    )


SLO = Slo.parse("ttft=200ms,itl=50ms")


def test_the_figures_of_a_window():
    answers = [
        answer(9.0, 0.1, [1.5], [4]),  # before the window, but its second chunk comes inside it
        answer(10.0, 0.1, [0.04, 0.02], [1, 2]),
        answer(11.0, 0.3, [0.04], [1]),  # first token too late
        answer(12.0, 0.1, [0.06], [3]),  # a gap too long
        answer(13.0, 0.1, [], [], error="429: full"),
        answer(14.9, 0.1, [0.5], [1], lag=0.02),  # ends outside the window
        answer(15.0, 0.1, [0.01], [1]),  # behind the window
    ]
    found = summarise(answers, 10.0, 5.0, SLO, rate=1.0)
    assert (found.sent, found.done, found.errors) == (5, 4, {"429: full": 1})
    assert found.achieved_rate == 4 / 5  # three of the window and the one from before
    assert found.output_tokens_per_s == (4 + 4 + 2 + 4 + 1) / 5
    assert (found.good, found.goodput) == (1, 0.2)
    assert found.ttft.p50 == pytest.approx(0.1)
    assert found.ttft.max == pytest.approx(0.3)
    assert found.itl_chunk.max == pytest.approx(0.5)
    # Per token: 0.04 x1, 0.01 x2, 0.04 x1, 0.02 x3, 0.5 x1.
    assert found.itl_token.mean == pytest.approx((0.04 + 0.02 + 0.04 + 0.06 + 0.5) / 8)
    assert found.itl_token.p50 == pytest.approx(0.02)
    assert found.tokens_per_chunk == pytest.approx((4 + 2 + 4 + 2) / 9)
    assert found.late == 1 and not found.kept_schedule
    assert any("1 of 5 requests more than 10 ms late" in note for note in found.notes)
    assert any("succeeded" in note for note in found.notes)


def test_a_closed_loop_counts_what_was_under_way():
    answers = [
        answer(1.0, 0.5, [1.0], [1]),  # over before the window
        answer(9.0, 0.5, [1.0, 2.0], [1, 2]),  # began before it
        answer(14.0, 0.5, [0.25, 9.0], [1, 1]),  # its last gap ends when others have left
        answer(15.5, 0.5, [0.1], [1]),  # began after it
    ]
    found = summarise(answers, 10.0, 5.0, SLO, clients=2)
    assert (found.sent, found.done) == (2, 2)
    assert (found.itl_chunk.mean, found.itl_chunk.max) == (pytest.approx(3.25 / 3), 2.0)
    assert found.output_tokens_per_s == (1 + 2 + 1 + 1) / 5
    assert found.achieved_rate == 1 / 5


def test_an_empty_window_has_no_latencies():
    found = summarise([], 0.0, 5.0, SLO, rate=0.1)
    assert (found.sent, found.ttft.p50, found.prompt_tokens) == (0, None, None)
    assert "no request arrived" in found.notes[0]
    assert found.kept_schedule


def test_guessed_tokens_and_a_busy_client_are_said():
    found = summarise([answer(1, 0.1, [0.1], [1], counted=False)], 0.0, 5.0, SLO, clients=1, client_cpu=0.95)
    assert any("spread evenly" in note for note in found.notes)
    assert any("95% of a core" in note for note in found.notes)
    assert (found.kind, found.rate, found.clients) == ("closed", None, 1)


def test_weighted_quantiles_are_those_of_repeated_values():
    import numpy as np

    values, weights = [5.0, 1.0, 3.0, 2.0], [1, 200, 30, 90]
    repeated = np.repeat(values, weights)
    found = quantiles(values, weights)
    assert found.mean == pytest.approx(repeated.mean())
    for share, value in ((50, found.p50), (95, found.p95), (99, found.p99)):
        assert value == np.percentile(repeated, share, method="inverted_cdf")
    assert found.max == 5.0
