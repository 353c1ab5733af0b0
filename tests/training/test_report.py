"""The page of a run has what it should, from nothing outside."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from training.tiny import tiny_trainer
from trimtab.training.watching.report.curves import MOST_POINTS, Curve, picture, smoothed, thinned
from trimtab.training.watching.report.write import data_shares, figures, flat, pictures


def test_the_page_of_a_run(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    trainer = tiny_trainer(tmp_path / "my <run>", validation={"every": 4})
    trainer.validation_bytes = 200
    trainer.train()
    page = (tmp_path / "my <run>/report.html").read_text(encoding="utf-8")
    assert "my &lt;run&gt;" in page and "my <run>" not in page
    assert "finished after 10 steps" in " ".join(page.split())
    assert page.count("<svg ") == 5
    assert "<code>optimizer.lr</code>" in page and "bits per byte" in page and "torch" in page
    assert "source 1" in page and "75.0%" in page
    # Nothing is loaded: the only addresses are the names of SVG's format.
    assert set(re.findall(r"https?://[^\"' )]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img)\b", page)


def test_shares_are_of_what_was_trained_on(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    lines = data_shares(trainer.source, {"taken": [50, 150]})
    assert lines == [("source 1", "75.0%", "25.0%", "50"), ("source 2", "25.0%", "75.0%", "150")]


def test_long_runs_are_drawn_as_means() -> None:
    points = [(i, float(i % 2)) for i in range(1, 10 * MOST_POINTS + 1)]
    few = thinned(points)
    assert len(few) == MOST_POINTS and few[-1][0] == 10 * MOST_POINTS
    assert all(y == 0.5 for _, y in few)
    assert thinned(points[:5]) == points[:5]
    assert smoothed([(1, 2.0), (2, 2.0)]) == [(1, 2.0), (2, 2.0)]


def test_pictures_of_odd_data() -> None:
    assert picture([Curve("none", [])], "nothing") == ""
    for points in ([(1, 3.0)], [(1, 2.0), (2, 2.0)], [(1, 0.0), (2, 0.0)], [(1, 1e9), (50, 2.0), (100, 1.0)]):
        svg = picture([Curve("values", points)], "values", from_zero=True)
        spots = re.findall(r"(-?[\d.]+),(-?[\d.]+)", re.findall(r'polyline[^>]* points="([^"]*)"', svg)[0])
        assert len(spots) == len(points)
        assert all(0 <= float(x) <= 440 and 0 <= float(y) <= 260 for x, y in spots)


def test_a_run_without_steps_has_a_page_too() -> None:
    assert figures([]) == [] and pictures([]) == []
    assert flat({"a": {"b": [1, 2]}, "c": [{"d": None}]}) == [("a.b", "1, 2"), ("c.0.d", "none")]
