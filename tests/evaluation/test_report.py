import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from evaluation.fakes import MODEL
from trimtab.evaluation.report import PlanInfo, Report, Row, TaskInfo, format_number
from trimtab.evaluation.tasks.base import Metric
from trimtab.registry import KV_CACHES, TASKS

PROVENANCE = {
    "date": "2025-06-01T12:00:00+00:00",
    "versions": {"trimtab": "0.1.0", "python": "3.11", "torch": "2", "numpy": "2"},
    "hardware": {"cpu": "Some CPU", "cores": 2, "ram_gb": 8.0, "gpu": "none", "os": "Linux", "threads": 2},
    "command": ["trimtab", "compare", "<weird & argument>"],
    "commit": None,
    "seed": 0,
}


def plan(label, cache="full"):
    settings = {"model": None, "cache": {"name": cache, "options": {}}, "threads": None}
    return PlanInfo(label, settings, "native", KV_CACHES.get(cache).card)


def task(label, name):
    options = {"lengths": (256, 512), "text": "shipped"}
    return TaskInfo(label, name, options, TASKS.get(name).card)


def metrics(perplexity, held, speed=100.0):
    return {
        "perplexity": Metric(perplexity, "", "lower", 0.5, 99, label="perplexity", axis="quality"),
        "kv_bytes_held": Metric(held, "B", "lower", label="KV held", axis="bytes"),
        "throughput_8": Metric(speed, "tok/s", "higher", label="tok/s ×8", axis="speed"),
        "tokens": Metric(4096, "tokens"),
    }


@pytest.fixture
def report():
    grid = {
        "accuracy": [[1.0, 0.5], [0.25, 0.0]],
        "lengths": [256, 512],
        "depths": [0.0, 1.0],
        "samples": 4,
        "question": "end",
    }
    needle = {"accuracy": Metric(0.5, "share", "higher", 0.1, 16, label="needle", axis="quality")}
    return Report(
        plans=[plan("full"), plan("streaming:<b>window</b>=64", "streaming"), plan("h2o", "h2o")],
        tasks=[task("perplexity", "perplexity"), task("needle:lengths=256+512", "needle")],
        rows=[
            Row("full", "perplexity", metrics(35.0, 2048.0, 100.0)),
            Row("full", "needle:lengths=256+512", needle, grid),
            Row(
                "streaming:<b>window</b>=64", "perplexity", metrics(37.0, 1024.0, 150.0), notes=("mind this",)
            ),
            Row("streaming:<b>window</b>=64", "needle:lengths=256+512", needle, grid),
            Row("h2o", "perplexity", metrics(float("inf"), 512.0, None)),
            Row("h2o", "needle:lengths=256+512", error="RuntimeError: <fell over>"),
        ],
        models=[MODEL],
        provenance=PROVENANCE,
    )


def test_columns_are_the_labelled_metrics_with_memory_first(report):
    assert [c.label for c in report.columns] == ["KV held", "perplexity", "tok/s ×8", "needle"]


def test_best_follows_direction_and_shares_ties(report):
    best = {c.label: report.best(c) for c in report.columns}
    assert best["perplexity"] == {"full"}
    assert best["KV held"] == {"h2o"}
    assert best["tok/s ×8"] == {"streaming:<b>window</b>=64"}
    assert best["needle"] == set()  # all equal: nothing to mark


def test_values_that_read_alike_are_equally_good(report):
    report.rows[2].metrics["perplexity"] = Metric(35.01, "", "lower", label="perplexity")
    column = next(c for c in report.columns if c.label == "perplexity")
    assert report.best(column) == {"full", "streaming:<b>window</b>=64"}


def test_table_shows_values_and_failures(report):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    lines = console.export_text().splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == ["plan", "KV held", "perplexity", "tok/s ×8", "needle"]
    assert re.split(r"\s{2,}", lines[1].strip()) == ["full", "2.0 KiB", "35.0", "100", "50%"]
    assert re.split(r"\s{2,}", lines[3].strip()) == ["h2o", "512 B", "–", "–", "failed"]


def test_jsonl_is_strict_and_every_line_stands_alone(report):
    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in report.to_jsonl().splitlines()]
    assert len(lines) == 6
    assert lines[4]["metrics"]["perplexity"]["value"] is None
    assert lines[5]["error"] == "RuntimeError: <fell over>"
    for line in lines:
        assert line["versions"]["torch"] == "2" and line["hardware"]["cpu"] == "Some CPU"
        assert line["seed"] == 0 and line["command"] and "commit" in line and line["date"]
        assert line["options"]["lengths"] == [256, 512]
    assert lines[2]["metrics"]["kv_bytes_held"]["ratio_to_first"] == 0.5


class Page(HTMLParser):
    """Collects what a page refers to and checks that its tags close."""

    VOID = ("meta", "wbr", "link", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action", "onload")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)


def test_page_is_whole_and_needs_nothing_from_outside(report):
    text = report.to_html()
    page = Page(text)
    assert page.links == [] and "script" not in page.tags and "link" not in page.tags
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert set(re.findall(r"https?://[^\"'<\s]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "viewport" in text


def test_page_escapes_what_it_is_given(report):
    text = report.to_html()
    assert "<b>window" not in text and "&lt;b&gt;window" in text
    assert "&lt;fell over&gt;" in text and "<fell over>" not in text
    assert "&lt;weird &amp; argument&gt;" in text


def test_page_has_every_part(report):
    text = report.to_html()
    assert text.count("<figure>") == 4 + 2  # two qualities against bytes and speed, and two heat maps
    assert "What failed" in text and "mind this" in text
    for card in (KV_CACHES.get("full").card, TASKS.get("needle").card):
        assert card.title in text
    for heading in ("Side by side", "What the plans do", "How each number was taken", "All numbers"):
        assert heading in text


def test_a_comparison_in_which_all_failed_still_makes_a_page(report):
    failed = [Row(r.plan, r.task, error="no") for r in report.rows]
    bare = Report(report.plans, report.tasks, failed, [], PROVENANCE)
    Page(bare.to_html())
    assert bare.columns == [] and "<svg" not in bare.to_html()


def test_one_plan_makes_a_page_without_pictures(report):
    alone = Report(report.plans[:1], report.tasks, report.rows[:2], [MODEL], PROVENANCE)
    text = alone.to_html()
    Page(text)
    assert "1 plan on tiny" in text and "What quality costs" not in text


def test_write_makes_both_files_or_none(report, tmp_path):
    paths = report.write(tmp_path)
    assert [p.name for p in paths] == ["results.jsonl", "report.html"]
    assert paths[0].read_text(encoding="utf-8") == report.to_jsonl()
    broken = Report(report.plans, [], report.rows, [{}], PROVENANCE)
    with pytest.raises(KeyError):
        broken.write(tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "", "–"),
        (float("nan"), "s", "–"),
        (0.8512, "share", "85%"),
        (0.00185, "s", "1.85 ms"),
        (0.149, "s", "149 ms"),
        (2.5, "s", "2.50 s"),
        (1536, "B", "1.5 KiB"),
        (1234.5, "tok/s", "1,234"),
        (34.96, "", "35.0"),
        (5.8, "bit", "5.80"),
        (2.5e9, "", "2.50e+09"),
        (-1.25, "", "−1.25"),
    ],
)
def test_numbers_are_written_for_people(value, unit, text):
    assert format_number(value, unit) == text


def test_changes_carry_their_sign():
    assert format_number(0.47, "", signed=True) == "+0.47"
    assert format_number(-0.05, "share", signed=True) == "−5%"
