import pytest

from serving.playground.mock_server import FULL
from serving.playground.screen import eventually

pytestmark = pytest.mark.slow


def test_two_plans_answer_the_same_prompt_and_are_compared(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.side_by_side()
    screen.ask("fork")
    assert {body["model"] for body in mock.bodies} == {"tiny", "tiny:kivi:bits=2"}
    assert screen.last.locator(".name").all_inner_texts() == ["full", "kivi:bits=2"]
    ratios = screen.last.locator(".ratios").inner_text()
    # Both write one token a word, and as many words.
    for said in ("kivi:bits=2 against full", "KV bytes 0.25×", "tokens/s 0.80×", "first token 1.00×"):
        assert said in ratios
    assert "per token" not in ratios
    marks = screen.last.locator("mark").all()
    marked = [mark.evaluate("mark => mark.lastChild.textContent") for mark in marks]
    assert marked == ["midday", "midnight"]
    comparison = screen.last.locator(".comparison").inner_text()
    assert "the same for 23 characters" in comparison and "prefix cache" not in comparison
    assert screen.last.locator("polyline").count() == 2
    assert mock.most_at_once == 2


def test_chance_is_the_same_on_both_sides_unless_a_seed_is_set(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.side_by_side()
    screen.ask("say: x")
    seeds = [body["seed"] for body in mock.bodies]
    assert seeds[0] == seeds[1]
    assert f"seed {seeds[0]}" in screen.last.inner_text()
    screen.set("seed", "7")
    screen.ask("say: x")
    assert [body["seed"] for body in mock.bodies[2:]] == [7, 7]
    assert "Both drew" not in screen.last.inner_text()
    screen.set("seed", "")
    screen.set("temperature", "0")
    screen.ask("say: x")
    assert all("seed" not in body for body in mock.bodies[4:])


def test_in_turn_nothing_runs_beside_the_other(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.side_by_side()
    screen.page.get_by_label("One after the other").check()
    screen.ask("fork")
    assert [body["model"] for body in mock.bodies] == ["tiny", "tiny:kivi:bits=2"]
    assert mock.most_at_once == 1


def test_stopping_stops_both(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.side_by_side()
    screen.send("slow")
    assert eventually(lambda: mock.writing == 2)
    screen.page.keyboard.press("Escape")
    assert eventually(lambda: mock.writing == 0)
    assert screen.last.get_by_text("Stopped.").count() == 2


def test_the_conversation_forks_where_the_second_column_opens(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.ask("say: shared")
    screen.side_by_side()
    screen.ask("fork")
    screen.ask("say: end")
    past = {body["model"]: [m["content"] for m in body["messages"]] for body in mock.bodies[-2:]}
    full, kivi = past["tiny"], past["tiny:kivi:bits=2"]
    assert full[:2] == kivi[:2] == ["say: shared", "shared"]
    assert (full[3], kivi[3]) == (
        "The tide came in at midday and rose.",
        "The tide came in at midnight and rose.",
    )


def test_with_one_plan_the_columns_compare_settings(serve, open_page):
    mock, address = serve([FULL])
    screen = open_page(address)
    screen.set("top_k", "40")
    screen.side_by_side()
    assert "trimtab serve --plan full --plan cache=kivi:bits=2" in screen.page.locator("#hint").inner_text()
    screen.page.locator("#which label", has_text="Right").click()
    assert screen.page.locator("#top_k-1").input_value() == "40"
    screen.set("temperature", "1.5", column=1)
    screen.set("system", "Rhyme.", column=1)
    screen.ask("say: hello")
    by_temperature = {body.get("temperature"): body for body in mock.bodies}
    assert by_temperature.keys() == {None, 1.5}
    assert all(body["top_k"] == 40 for body in mock.bodies)
    assert by_temperature[1.5]["messages"][0] == {"role": "system", "content": "Rhyme."}
    assert screen.last.locator(".name").all_inner_texts() == [
        "full, left no system message, temperature unset",
        "full, right system message, temperature 1.5",
    ]
    assert screen.page.locator("#hint code").count() == 1


def test_one_side_may_fail_without_the_other(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.page.route(
        "**/v1/chat/completions",
        lambda route: (
            route.fulfill(status=404, json={"error": {"message": "there is no model 'tiny'"}})
            if route.request.post_data_json["model"] == "tiny"
            else route.continue_()
        ),
    )
    screen.side_by_side()
    screen.ask("say: hello")
    assert screen.problems == ["there is no model 'tiny'"]
    assert screen.last.locator(".of-1 .text").inner_text() == "hello"
    assert screen.last.locator(".comparison").count() == 0
    # The side that failed does not remember what was not answered.
    screen.page.unroute("**/v1/chat/completions")
    screen.ask("say: there")
    past = {body["model"]: len(body["messages"]) for body in mock.bodies[-2:]}
    assert past == {"tiny": 1, "tiny:kivi:bits=2": 3}


@pytest.mark.parametrize(
    ("a", "b", "at"),
    [
        ("", "", -1),
        ("same", "same", -1),
        ("", "x", 0),
        ("abc", "abd", 2),
        ("abc", "abcdef", 3),
        ("😀", "😁", 0),  # the first halves of these two are equal
        ("a😀", "a", 1),
        ("a😀b", "a😀c", 3),
    ],
)
def test_where_texts_part(serve, open_page, a, b, at):
    screen = open_page(serve()[1])
    assert screen.module("compare.js", "m.firstDifference(x[0], x[1])", [a, b]) == at
    assert screen.module("compare.js", "m.firstDifference(x[0], x[1])", [b, a]) == at


@pytest.mark.parametrize(
    ("a", "b", "left", "right"),
    [
        ("the tide rose", "the time rose", ["the ", "tide", " rose"], ["the ", "time", " rose"]),
        ("the tide", "the tides", ["the ", "tide", ""], ["the ", "tides", ""]),
        ("the tide", "the tide rose high", ["the tide", "", ""], ["the tide", " rose", " high"]),
        ("the tide\n", "the tide rose", ["the tide", "\n", ""], ["the tide", " rose", ""]),
        ("", "a b", ["", "", ""], ["", "a", " b"]),
    ],
)
def test_the_word_that_is_marked(serve, open_page, a, b, left, right):
    screen = open_page(serve()[1])
    cut = "x.map(text => m.cut(text, m.wordStart(x[0], x[1], m.firstDifference(x[0], x[1]))))"
    assert screen.module("compare.js", cut, [a, b]) == [left, right]


def test_bytes_per_token_are_told_when_one_wrote_more(serve, open_page):
    screen = open_page(serve()[1])
    made = screen.module(
        "compare.js",
        "m.comparison(...x).textContent",
        [
            {
                "name": "a",
                "text": "x y",
                "usage": {"prompt_tokens": 8, "completion_tokens": 2},
                "stats": {"kv_bytes_held": 100, "cached_prompt_tokens": 1600},
                "tokensPerSecond": 10,
                "firstToken": 0.1,
            },
            {
                "name": "b",
                "text": "x y z",
                "usage": {"prompt_tokens": 8, "completion_tokens": 12},
                "stats": {"kv_bytes_held": 50},
                "tokensPerSecond": 25,
            },
        ],
    )
    assert "KV bytes 0.50×" in made and "per token 0.25×" in made
    assert "tokens/s 2.50×" in made and "first token –" in made
    assert "the prefix cache gave the left 1,600 and the right 0 of the prompt's tokens" in made
    assert "The texts are the same for 3 characters; then a ends." in made
