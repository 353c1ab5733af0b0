import itertools
import random
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.evaluation.charts import Axis, Point, heat_map, pareto, scatter
from trimtab.evaluation.labels import Box, place, text_width
from trimtab.pages.axes import scale_for

BYTES = Axis("KV bytes", "B", "lower")
SPEED = Axis("Speed", "tok/s", "higher")
LOSS = Axis("Perplexity", "", "lower")
RIGHT = Axis("Needle", "share", "higher")

values = st.floats(1e-3, 1e9)
plans = st.lists(st.tuples(values, values), min_size=1, max_size=12)


def points(pairs, error=None):
    return [Point(f"plan:{i}", x, y, error) for i, (x, y) in enumerate(pairs)]


def test_pareto_front_of_a_known_set():
    #                  best x  middle   beaten   best y   equal to it
    found = pareto(points([(1, 9), (2, 5), (3, 6), (4, 1), (4, 1)]), BYTES, LOSS)
    assert found == [True, True, False, True, True]
    assert pareto(points([(1, 9), (2, 5), (3, 6)]), SPEED, RIGHT) == [True, False, True]


@given(plans)
def test_pareto_front_agrees_with_its_definition(pairs):
    on_front = pareto(points(pairs), BYTES, RIGHT)
    for (x, y), on in zip(pairs, on_front, strict=True):
        better = [(a, b) for a, b in pairs if a <= x and b >= y and (a < x or b > y)]
        assert on == (not better)


@given(plans)
@settings(max_examples=60)
def test_labels_never_overlap_each_other_or_a_dot(pairs):
    area = Box(0, 0, 400, 250)
    rng = random.Random(0)
    dots = [(20 + x % 360, 20 + y % 210) for x, y in pairs]
    sizes = [(text_width("kivi:bits=2"[: rng.randint(3, 11)], 12), 15.0) for _ in dots]
    found = [p.box for p in place(dots, sizes, area) if p is not None]
    assert len(found) == len(dots)
    for a, b in itertools.combinations(found, 2):
        assert not a.overlaps(b)
    for box in found:
        assert box.inside(area)
        assert not any(box.overlaps(Box(x - 5, y - 5, x + 5, y + 5)) for x, y in dots)


def test_labels_keep_clear_of_lines_where_they_can():
    line = Box(0, 100, 400, 100)
    spot = place([(200, 100)], [(60, 15)], Box(0, 0, 400, 250), lines=[line])[0]
    assert spot is not None and not spot.needs_leader
    assert not spot.box.overlaps(line)


def test_a_label_without_room_is_left_out():
    assert place([(50, 50)], [(300, 15)], Box(0, 0, 100, 100)) == [None]


@given(
    st.lists(
        st.floats(-1e6, 1e9, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-290),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["", "B", "tok/s"]),
    st.booleans(),
)
def test_scales_hold_all_values_and_have_readable_ticks(numbers, unit, zero):
    scale = scale_for(numbers, unit, zero=zero)
    for value in numbers:
        assert -1e-6 <= scale.place(value) <= 1 + 1e-6
    assert 1 <= len(scale.ticks) <= 14
    assert list(scale.ticks) == sorted(set(scale.ticks))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_share_scales_never_tick_beyond_zero_and_one(shares):
    scale = scale_for(shares, "share")
    assert all(-1e-9 <= t <= 1 + 1e-9 for t in scale.ticks)
    assert scale.high - scale.low >= 0.25


def test_scales_choose_zero_and_logarithm_by_the_data():
    assert scale_for([100, 900], "tok/s", zero=True).low == 0
    assert scale_for([800, 900], "tok/s", zero=True).low > 0
    assert scale_for([30, 3000], "").log and not scale_for([30, 60], "").log
    ticks = scale_for([600 * 1024, 1.9 * 1024**2], "B", zero=True)
    assert [ticks.tick_text(t) for t in ticks.ticks][:3] == ["0", "512 KiB", "1 MiB"]


@pytest.mark.parametrize(("x", "y"), list(itertools.product((BYTES, SPEED), (LOSS, RIGHT))))
def test_scatter_is_whole_svg_with_every_plan_named_once(x, y):
    rng = random.Random(0)
    made = [Point(f"a<b>&{i}", rng.uniform(1, 1e6), rng.random(), 0.05) for i in range(8)]
    root = ElementTree.fromstring(scatter(made, x, y))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    names = [e.text for e in root.iter() if (e.get("class") or "").startswith("name")]
    assert sorted(names) == sorted(p.label for p in made)
    front = pareto(made, x, y)
    assert [("front" in c.get("class").split()) for c in circles] == front
    assert len([e for e in root.iter() if e.get("class") == "whisker"]) == 8


def test_the_front_passes_through_its_dots_and_only_gets_worse_outwards():
    svg = scatter(points([(1e6, 9), (2e6, 5), (3e6, 6), (4e6, 1)]), BYTES, LOSS)
    line = re.search(r'class="front" points="([^"]+)"', svg)[1]
    path = [tuple(map(float, pair.split(","))) for pair in line.split()]
    dots = re.findall(r'class="dot front" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(dots) == 3
    for cx, cy in dots:
        assert (float(cx), float(cy)) in path
    assert [x for x, _ in path] == sorted(x for x, _ in path)
    for (x0, y0), (x1, y1) in itertools.pairwise(path):
        assert x0 == x1 or y0 == y1  # steps, no slopes


def test_one_plan_and_equal_plans_can_be_drawn():
    ElementTree.fromstring(scatter(points([(5, 5)]), BYTES, LOSS))
    ElementTree.fromstring(scatter(points([(5, 1.0)] * 4, error=0.0), SPEED, RIGHT))


def test_long_names_are_shortened_but_whole_in_the_tooltip():
    name = "kivi:bits=2,group_size=64,residual=256 max_batch=4"
    svg = scatter([Point(name, 1, 1), Point("b", 2, 2)], BYTES, LOSS)
    assert f"<title>{name}" in svg
    assert any(t.endswith("…") for t in re.findall(r'class="name[^>]*>([^<]+)<', svg))


def test_heat_map_has_a_cell_for_each_share():
    root = ElementTree.fromstring(heat_map([[1.0, 0.5], [0.25, 0.0]], ["256", "512"], ["0%", "100%"], "grid"))
    cells = [e for e in root.iter() if e.get("class") == "cell"]
    texts = [e.text for e in root.iter() if (e.get("class") or "").startswith("cell-text")]
    assert texts == ["100", "50", "25", "0"]
    strengths = [float(c.get("fill-opacity")) for c in cells]
    assert strengths == sorted(strengths, reverse=True) and strengths[0] == 1.0
