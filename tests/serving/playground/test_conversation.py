import json

import pytest

from serving.playground.screen import eventually

pytestmark = pytest.mark.slow


def test_an_answer_is_streamed_with_its_plan_and_figures(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    assert screen.page.locator("#plan-0").inner_text() == "cache=full bfloat16 · cpu · context 2,048"
    screen.ask("say: All is well, naïve 日本 👩‍🚀!")
    assert screen.answers == ["All is well, naïve 日本 👩‍🚀!"]
    assert screen.last.locator(".name").inner_text() == "full"
    tokens = int(screen.figures()["tokens"])
    prompt = mock_prompt_tokens(mock.bodies[0])
    assert tokens == 6
    assert screen.figures() == {
        "tokens/s": "100",
        "first token": "20.0 ms",
        "KV bytes": f"{(tokens + prompt):.1f} KiB",
        "tokens": "6",
    }
    assert mock.bodies[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert screen.page.locator("#said").inner_text().startswith("full: All is well")
    assert screen.page.locator("#prompt").input_value() == ""


def mock_prompt_tokens(body):
    return len(body["messages"][-1]["content"]) // 4 + 10 * len(body["messages"])


def test_the_conversation_goes_along_and_the_text_mode_has_none(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.set("system", "Be brief.")
    screen.ask("say: one")
    screen.ask("say: two")
    roles = [(m["role"], m["content"]) for m in mock.bodies[-1]["messages"]]
    assert roles == [
        ("system", "Be brief."),
        ("user", "say: one"),
        ("assistant", "one"),
        ("user", "say: two"),
    ]
    screen.complete()
    assert screen.page.locator(".exchange:visible").count() == 0
    screen.ask("Once upon")
    assert mock.bodies[-1]["prompt"] == "Once upon"
    assert "messages" not in mock.bodies[-1]
    assert screen.answers == ["Once uponOnce upon"]
    screen.page.get_by_role("button", name="Go on from here").click()
    assert screen.page.locator("#prompt").input_value() == "Once uponOnce upon"
    screen.page.locator("#mode label", has_text="Chat").click()
    assert screen.page.locator(".exchange:visible").count() == 2


@pytest.mark.parametrize("how", ["escape", "button", "leave"])
def test_stopping_ends_the_request_on_the_server(serve, open_page, how):
    mock, address = serve()
    screen = open_page(address)
    screen.send("slow")
    screen.until("document.querySelector('.text').textContent.length > 20")
    assert mock.writing == 1
    if how == "escape":
        screen.page.keyboard.press("Escape")
    elif how == "button":
        screen.page.get_by_role("button", name="Stop").click()
    else:
        screen.page.goto("about:blank")
    assert eventually(lambda: mock.writing == 0)
    assert mock.disconnected == 1
    if how != "leave":
        screen.page.wait_for_selector("#send", state="visible")
        assert "Stopped." in screen.last.inner_text()
        assert screen.problems == []
        # What was written stays part of the conversation.
        written = screen.answers[0]
        screen.ask("say: more")
        assert mock.bodies[-1]["messages"][1] == {"role": "assistant", "content": written}


def test_text_of_a_model_is_never_markup(serve, open_page):
    _, address = serve()
    screen = open_page(address)
    evil = "<img src=x onerror=alert(1)> <script>alert(2)</script> <b>bold</b> &amp;"
    screen.side_by_side()
    screen.ask(f"say: {evil}")
    assert screen.answers == [evil, evil]
    assert screen.last.locator("img, script, .text b").count() == 0


def test_refused_requests_show_the_servers_sentence_and_give_the_prompt_back(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.ask("say: before")
    screen.set("temperature", "-1")
    screen.ask("fail")
    assert screen.problems == ["temperature is -1; it must be a number, at least 0"]
    assert screen.page.locator("#prompt").input_value() == "fail"
    assert screen.last.locator(".figures").is_hidden()
    screen.ask("busy")
    assert screen.problems[-1] == "the queue is full (Retry after 3 s.)"
    screen.ask("say: after")
    assert [m["content"] for m in mock.bodies[-1]["messages"]] == ["say: before", "before", "say: after"]


def test_an_answer_that_breaks_off_says_so_and_keeps_what_came(serve, open_page):
    _, address = serve()
    screen = open_page(address)
    screen.ask("break")
    assert screen.answers == ["one two three "]
    assert screen.problems == ["the engine failed"]
    screen.ask("cut")
    assert screen.problems[-1] == "The connection ended before the answer did."


def test_a_server_that_is_gone(serve, open_page):
    _, address = serve()
    screen = open_page(address)
    screen.page.context.set_offline(True)
    screen.ask("say: anyone?")
    assert screen.problems == [f"The server at {address.split('/')[2]} does not answer."]
    screen.page.context.set_offline(False)
    screen.page.locator("#prompt").press("Enter")
    screen.page.wait_for_selector(".exchange:nth-of-type(2) .text")
    screen.page.wait_for_selector("#send", state="visible")
    assert screen.answers == ["anyone?"]


def test_a_key_is_asked_for_and_kept_for_the_tab(serve, open_page):
    mock, address = serve(key="open sesame")
    screen = open_page(address)
    assert "API key is missing" in screen.page.locator("#notice-text").inner_text()
    assert screen.page.evaluate("document.activeElement.id") == "key"
    screen.page.keyboard.type("wrong")
    screen.page.keyboard.press("Enter")
    screen.until("document.getElementById('key').value === ''")
    assert screen.page.locator("#key").is_visible()
    screen.page.locator("#key").fill("open sesame")
    screen.page.keyboard.press("Enter")
    screen.page.wait_for_selector("#notice", state="hidden")
    screen.ask("say: open")
    assert screen.answers == ["open"]
    screen.page.reload()
    screen.page.wait_for_selector("#model-0 option", state="attached")
    assert screen.page.locator("#notice").is_hidden()
    mock.key = "changed"
    screen.ask("say: again")
    assert screen.page.locator("#key").is_visible()


def test_clear_can_be_undone_and_again_asks_the_same(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.ask("say: one")
    screen.ask("say: two")
    screen.page.get_by_role("button", name="Again").click()
    screen.page.wait_for_selector("#send", state="visible")
    assert eventually(lambda: len(mock.bodies) == 3)
    assert mock.bodies[2]["messages"] == mock.bodies[1]["messages"]
    assert screen.page.locator(".exchange").count() == 2
    screen.page.get_by_role("button", name="Clear").click()
    assert screen.page.locator(".exchange").count() == 0
    assert screen.page.locator("h1").is_visible()
    screen.page.get_by_role("button", name="Undo clear").click()
    assert screen.page.locator(".exchange").count() == 2
    screen.page.get_by_role("button", name="Clear").click()
    screen.ask("say: new")
    assert len(mock.bodies[-1]["messages"]) == 1
    assert screen.page.locator("#clear").inner_text() == "Clear"


def test_the_conversation_is_exported_as_json(serve, open_page):
    _, address = serve()
    screen = open_page(address)
    screen.side_by_side()
    screen.set("temperature", "0")
    screen.ask("fork")
    with screen.page.expect_download() as download:
        screen.page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename.startswith("trimtab-")
    kept = json.loads(download.value.path().read_text())
    (exchange,) = kept["exchanges"]
    assert (exchange["mode"], exchange["prompt"]) == ("chat", "fork")
    assert [a["text"] for a in exchange["answers"]] == [
        "The tide came in at midday and rose.",
        "The tide came in at midnight and rose.",
    ]
    left, right = exchange["answers"]
    assert left["request"]["model"] == "tiny" and right["request"]["model"] == "tiny:kivi:bits=2"
    assert left["request"]["temperature"] == 0
    assert left["finish_reason"] == "stop"
    assert left["trimtab"]["kv_bytes_held"] == 4 * right["trimtab"]["kv_bytes_held"]


def test_a_model_without_a_chat_template_continues_text(serve, open_page):
    from serving.playground.mock_server import served

    mock, address = serve([served("plain", "cache=full", chat=False)])
    screen = open_page(address)
    assert screen.page.locator("#mode input[value=chat]").is_disabled()
    assert "no chat template" in screen.page.locator("#hint").inner_text()
    screen.ask("The ship")
    assert mock.bodies[0]["prompt"] == "The ship"


def test_a_reader_who_scrolled_up_is_left_there(serve, open_page):
    _, address = serve()
    screen = open_page(address, height=500)
    for _ in range(3):
        screen.ask("say: " + "word " * 150)
    screen.send("slow")
    screen.until("document.querySelectorAll('.text')[3]?.textContent.length > 20")
    at_end = "document.scrollingElement.scrollHeight - scrollY - innerHeight < 5"
    assert screen.page.evaluate(at_end)
    screen.page.evaluate("scrollTo(0, 0)")
    screen.until("document.querySelectorAll('.text')[3].textContent.length > 100")
    assert screen.page.evaluate("scrollY") == 0
    screen.page.keyboard.press("Escape")
