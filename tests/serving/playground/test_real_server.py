"""The page against `trimtab serve` and the shipped model: what the mock promises is what the server does."""

import re

import pytest

from serving.playground.screen import eventually
from serving.process import PATIENCE_S, Served

pytestmark = pytest.mark.slow

# Long enough that most of its rows are packed: kivi keeps the newest ones as they are.
TALE = "The keeper climbed the stairs of the lighthouse and looked out over the sea. " * 40


@pytest.fixture(scope="module")
def server():
    with Served("--plan", "full", "--plan", "cache=kivi:bits=2") as running:
        yield running.wait_ready()


@pytest.fixture
def screen(server, open_page):
    return open_page(f"http://127.0.0.1:{server.port}/")


def test_two_plans_of_one_model_are_compared(screen):
    screen.complete()
    screen.side_by_side()
    screen.set("temperature", "0")
    screen.set("max_tokens", "24")
    screen.ask(TALE)
    assert screen.problems == []
    assert screen.last.locator(".name").all_inner_texts() == ["full", "kivi:bits=2"]
    for text in screen.answers:
        assert text.startswith(TALE.strip()) and len(text) > len(TALE)
    full, kivi = screen.figures(0), screen.figures(1)
    assert (full["tokens"], kivi["tokens"]) == ("24", "24")
    assert all(re.fullmatch(r"[\d.,]+ (ms|s)", figures["first token"]) for figures in (full, kivi))
    ratio = re.search(r"KV bytes ([\d.]+)×", screen.last.locator(".ratios").inner_text())
    assert 0.05 < float(ratio[1]) < 0.7
    assert screen.last.locator("polyline").count() == 2


def test_a_conversation_with_every_setting(screen):
    numbers = {
        "temperature": 0.8,
        "top_p": 0.9,
        "min_p": 0.05,
        "top_k": 40,
        "max_tokens": 20,
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
    }
    settings = {name: str(value) for name, value in numbers.items()}
    settings |= {"stop": "never\\n", "system": "Be brief."}
    for name, value in settings.items():
        screen.set(name, value)
    screen.ask("Hello there.")
    first = screen.answers
    screen.ask("And then?")
    assert screen.problems == []
    # The first turn is in the cache. A seed draws the same again.
    assert "from the prefix cache" in screen.last.inner_text()
    screen.page.get_by_role("button", name="Clear").click()
    screen.ask("Hello there.")
    assert screen.answers == first


@pytest.mark.parametrize(
    ("kind", "shape", "fits"),
    [("choice", "left\nright", "left|right"), ("regex", "(yes|no), [a-z]{3,5}!", "(yes|no), [a-z]{3,5}!")],
)
def test_structured_output(screen, kind, shape, fits):
    screen.set("form", kind)
    screen.set("shape", shape)
    screen.ask("Which one?")
    assert screen.problems == []
    assert re.fullmatch(fits, screen.answers[0])


def test_the_servers_sentence_is_shown(screen):
    screen.ask("word " * 3000)
    assert "context is 2048 tokens" in screen.problems[0]
    screen.set("top_p", "7")
    screen.ask("Hi")
    assert screen.problems[-1].startswith("top_p is 7")


def test_stopping_frees_the_blocks(server, screen):
    screen.complete()
    # Greedily the shipped model goes on about this until its context is full.
    screen.set("temperature", "0")
    screen.set("max_tokens", "2000")
    screen.send("The ship had been at sea")
    screen.until("document.querySelector('.text')?.textContent.length > 40")
    assert server.gauge("kv_bytes_held") > 0
    screen.page.keyboard.press("Escape")
    assert eventually(lambda: server.gauge("kv_bytes_held") == 0, PATIENCE_S)
    assert "Stopped." in screen.last.inner_text()


def test_a_key_opens_the_page(open_page):
    with Served("--api-key", "open-sesame") as running:
        running.wait_ready()
        screen = open_page(f"http://127.0.0.1:{running.port}/")
        assert "API key is missing" in screen.page.locator("#notice-text").inner_text()
        screen.page.locator("#key").fill("open-sesame")
        screen.page.keyboard.press("Enter")
        screen.page.wait_for_selector("#notice", state="hidden")
        # One plan: the columns compare settings.
        screen.side_by_side()
        screen.set("max_tokens", "5", column=0)
        screen.page.locator("#which label", has_text="Right").click()
        screen.set("max_tokens", "9", column=1)
        screen.ask("Hello")
        assert screen.problems == []
        assert screen.last.locator(".name").all_inner_texts() == [
            "full, left max_tokens 5",
            "full, right max_tokens 9",
        ]
