"""The whole measurement against a fake server, and its picture and page."""

from __future__ import annotations

import asyncio
import json
from xml.etree import ElementTree

import pytest

from evaluation.load.fake_server import FakeServer
from trimtab.errors import TrimtabError
from trimtab.evaluation.load import measure as whole
from trimtab.evaluation.load.client import Client
from trimtab.evaluation.load.page import notes, pictures, render, tables, three
from trimtab.evaluation.load.picture import Curve, curves, sheet
from trimtab.evaluation.load.run import run_async
from trimtab.evaluation.load.slo import Slo
from trimtab.evaluation.load.summary import Quantiles, summarise

BRIEF = {"duration": 0.15, "warmup": 0.05, "slo": Slo.parse("ttft=10s")}
ORIGIN = {
    "versions": {"trimtab": "0"},
    "date": "today",
    "commit": None,
    "hardware": {"cpu": "<one>", "cores": 2},
}


def measured(settings, answer=None, model=None):
    async def main():
        async with FakeServer(answer) as server:
            client = Client(server.url)
            try:
                return await whole.measure(client, settings, model), server
            finally:
                await client.close()

    return run_async(main())


def test_rates_are_measured_one_after_another():
    found, server = measured(whole.Settings(rates=(40.0, 80.0), **BRIEF))
    assert [s.rate for s in found.summaries] == [40.0, 80.0]
    first = found.summaries[0]
    assert first.sent == first.done == first.good > 0
    assert first.errors == {}
    assert first.ttft.p50 > 0 and first.tokens_per_chunk == 1.0
    assert (found.served.name, found.workload.context) == ("fake", 512)
    assert found.workload.characters_per_token == pytest.approx(4, rel=0.02)
    bodies = [body for path, body, _ in server.seen if path == "/v1/completions"][1:]
    assert len(bodies) == sum(len(answers) for answers in found.answers)
    assert all(body["ignore_eos"] and body["model"] == "fake" for body in bodies)


def test_the_same_seed_asks_the_same():
    runs = [measured(whole.Settings(rates=(60.0,), seed=seed, **BRIEF))[1].seen for seed in (1, 1, 2)]
    asked = [sorted(json.dumps(body) for _, body, _ in seen) for seen in runs]
    assert asked[0] == asked[1] != asked[2]


def test_auto_takes_fractions_of_the_capacity():
    async def slow(path, body):
        await asyncio.sleep(0.02)
        return await FakeServer().complete(path, body | {"max_tokens": 2})

    found, _ = measured(whole.Settings(clients=2, **BRIEF), slow)
    closed, *rates = found.summaries
    assert (closed.kind, closed.clients) == ("closed", 2)
    assert 0 < found.capacity <= 100
    shares = [s.rate / found.capacity for s in rates]
    assert shares == pytest.approx(whole.FRACTIONS, rel=0.01)


def test_real_prompts_go_to_the_chat(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"turns": ["What?"]}) + "\n" + json.dumps({"prompt": "x" * 9000}) + "\n")
    found, server = measured(whole.Settings(rates=(40.0,), prompts=file, **BRIEF))
    asked = [body for path, body, _ in server.seen if path == "/v1/chat/completions"]
    assert {body["messages"][0]["content"] for body in asked} == {"What?"}
    assert "ignore_eos" not in asked[0]
    assert found.left_out == 1
    assert any("1 prompts were left out" in note for note in notes(found))


def test_a_server_that_refuses_is_told_at_once():
    async def refuse(path, body):
        return 400, b'{"error": {"message": "no such field"}}'

    with pytest.raises(TrimtabError, match="refused a first request: 400: no such field"):
        measured(whole.Settings(rates=(40.0,), **BRIEF), refuse)
    with pytest.raises(TrimtabError, match="has no model 'c'; it has 'fake', 'b'"):
        measured(whole.Settings(rates=(40.0,), **BRIEF), model="c")


def test_errors_are_counted_by_their_reason():
    async def full(path, body):
        return (
            (429, b'{"error": {"message": "full"}}')
            if body.get("stream")
            else await FakeServer().complete(path, body)
        )

    found, _ = measured(whole.Settings(rates=(40.0,), **BRIEF), full)
    (summary,) = found.summaries
    assert summary.errors == {"429: full": summary.sent}
    assert (summary.done, summary.goodput, summary.ttft.p50) == (0, 0.0, None)
    with pytest.raises(TrimtabError, match="capacity could not be measured: 429: full"):
        measured(whole.Settings(**BRIEF), full)


def test_an_unknown_context_is_taken_and_said():
    found, _ = measured(whole.Settings(rates=(40.0,), **BRIEF), model="b")
    assert found.workload.context == 2048
    assert "does not tell its context" in found.notes[0]


def test_the_page_and_the_picture_hold_what_was_measured():
    settings = whole.Settings(rates=(40.0, 80.0), **BRIEF)
    found, _ = measured(settings)
    files = render(found, settings, ORIGIN)
    page = files["load.html"].decode()
    assert "&lt;one&gt;" in page and "40/s" in page and "ttft &lt;= 10000 ms" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing from outside
    root = ElementTree.fromstring(files["load.svg"])
    assert (
        len(root.findall("{http://www.w3.org/2000/svg}svg")) == len(pictures(found.summaries, settings)) == 6
    )
    assert [t.row_count for t in tables(found.summaries)] == [2, 2]
    json.dumps(whole.describe(found, settings))


def test_a_measurement_without_answers_has_a_page_too():
    settings = whole.Settings(rates=(1.0,), **BRIEF)
    found, _ = measured(settings)
    found.summaries = [summarise([], 0.0, 1.0, settings.slo, rate=1.0)]
    page = render(found, settings, ORIGIN)["load.html"].decode()
    assert "no request arrived" in page


def test_curves_skip_what_is_not_known_and_keep_names_apart():
    lines = [
        Curve("p50", [(1, 0.1), (2, None), (3, 0.2)]),
        Curve("p<95", [(1, 0.1), (3, 0.2)]),
        Curve("no", [(1, None)]),
    ]
    svg = curves(lines, "load", "latency", "s", ("SLO", 0.15))
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    assert [len(line.get("points").split()) for line in root.iter(f"{space}polyline")] == [2, 2]
    ends = [t for t in root.iter(f"{space}text") if t.get("class").startswith("end")]
    assert [t.text for t in ends] == ["p50", "p<95"]
    assert abs(float(ends[0].get("y")) - float(ends[1].get("y"))) >= 14
    assert any(t.text == "SLO" for t in root.iter(f"{space}text"))
    assert curves([Curve("no", [(1, None)])], "x", "y", "s") == ""
    ElementTree.fromstring(sheet([("a & b", svg)], "t"))


@pytest.mark.parametrize(
    ("quantiles", "text"),
    [
        (Quantiles(), "–"),
        (Quantiles(0.01, 0.01, 0.02, 0.0333), "10.0 / 20.0 / 33.3 ms"),
        (Quantiles(1, 0.9, 1.2, 3), "900 / 1200 / 3000 ms"),
        (Quantiles(9, 8, 11, 12), "8.0 / 11.0 / 12.0 s"),
    ],
)
def test_quantiles_are_written_in_one_unit(quantiles, text):
    assert three(quantiles) == text
