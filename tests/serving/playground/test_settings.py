import ast
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

STREAMING = {"stream", "stream_options", "model", "messages"}


def fields(body):
    return {name: value for name, value in body.items() if name not in STREAMING}


def test_only_what_is_set_is_sent(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.ask("say: x")
    assert fields(mock.bodies[0]) == {"max_tokens": 256}
    settings = {
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.05,
        "top_k": 40,
        "max_tokens": 12,
        "seed": 3,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
    }
    for name, value in settings.items():
        screen.set(name, str(value))
    screen.set("stop", "END\n\\n\\n\na\\\\nb\n\\d")
    screen.ask("say: x")
    assert fields(mock.bodies[1]) == settings | {"stop": ["END", "\n\n", "a\\nb", "\\d"]}
    screen.page.get_by_role("button", name="Back to defaults").click()
    screen.ask("say: x")
    assert fields(mock.bodies[2]) == {"max_tokens": 256}


def test_sliders_write_the_number_beside_them_and_follow_it(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    slider = screen.page.locator("input[data-slides=temperature]")
    slider.fill("0.35")
    assert screen.page.locator("#temperature-0").input_value() == "0.35"
    screen.set("temperature", "1.2")
    assert slider.input_value() == "1.2"
    screen.ask("say: x")
    assert mock.bodies[0]["temperature"] == 1.2


@pytest.mark.parametrize(
    ("kind", "shape", "sent"),
    [
        ("json", '{"type": "object"}', {"json": {"type": "object"}}),
        ("regex", "[a-z]+\n", {"regex": "[a-z]+\n"}),
        ("choice", "yes\nno\n", {"choice": ["yes", "no"]}),
    ],
)
@pytest.mark.parametrize("mode", ["chat", "text"])
def test_structured_output(serve, open_page, kind, shape, sent, mode):
    mock, address = serve()
    screen = open_page(address)
    if mode == "text":
        screen.complete()
    screen.set("form", kind)
    screen.set("shape", shape)
    screen.ask("say: x")
    assert mock.bodies[0]["structured_outputs"] == sent


def test_any_json_object_needs_no_box(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.set("form", "json_object")
    assert screen.page.locator("#shape-0").is_hidden()
    screen.ask("say: x")
    assert mock.bodies[0]["structured_outputs"] == {"json_object": True}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"seed": "9007199254740993"},
            "Seed is 9007199254740993; a browser keeps whole numbers below 2^53 only.",
        ),
        ({"form": "json", "shape": "{"}, "The JSON schema is not JSON: "),
        ({"form": "regex"}, "Regular expression is empty; write one, or choose free text."),
    ],
)
def test_what_cannot_be_sent_is_said_at_its_field(serve, open_page, settings, said):
    mock, address = serve()
    screen = open_page(address)
    for name, value in settings.items():
        screen.set(name, value)
    screen.ask("say: x")
    assert screen.problems[0].startswith(said)
    assert mock.bodies == []
    assert screen.page.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"
    assert screen.page.locator("#prompt").input_value() == "say: x"


def test_letters_in_a_number_are_not_ignored(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    screen.page.locator("#temperature-0").focus()
    screen.page.keyboard.type("1e")
    screen.ask("say: x")
    assert screen.problems == ["Temperature is not a number."]
    assert mock.bodies == []


@pytest.fixture
def copying(serve, open_page):
    """A page whose clipboard can be read, with hard texts set; what it copies when a button is pressed."""

    def copying(key=None):
        mock, address = serve(key=key)
        screen = open_page(address, permissions=["clipboard-read", "clipboard-write"])
        if key:
            screen.page.locator("#key").fill(key)
            screen.page.keyboard.press("Enter")
            screen.page.wait_for_selector("#model-0 option", state="attached")
        screen.set("system", 'It\'s "quoted" \\ $HOME `x`\nüñ😀')
        screen.set("top_k", "5")
        screen.set("form", "json")
        screen.set("shape", '{"type": "object", "additionalProperties": false, "default": null}')
        screen.type("say: don't <b>")

        def copied(name):
            screen.page.get_by_role("button", name=name).click()
            screen.until("document.getElementById('said').textContent === 'Copied.'")
            screen.page.evaluate("document.getElementById('said').textContent = ''")
            return screen.page.evaluate("navigator.clipboard.readText()")

        return mock, screen, copied

    return copying


def test_the_curl_command_asks_the_same(copying, monkeypatch):
    mock, screen, copied = copying(key="s3cret")
    command = copied("Copy as curl")
    assert "s3cret" not in command
    monkeypatch.setenv("TRIMTAB_API_KEY", "s3cret")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.rstrip().endswith("data: [DONE]")
    screen.page.locator("#prompt").press("Enter")
    screen.page.wait_for_selector(".exchange .figures")
    by_hand, by_page = mock.bodies[0], mock.bodies[1]
    assert by_hand == {name: value for name, value in by_page.items() if name != "stream_options"}
    # With nothing typed, the last request is copied.
    screen.page.wait_for_selector("#send", state="visible")
    again = copied("Copy as curl")
    assert json.loads(json.dumps(again)) == command


def test_the_python_program_asks_the_same(copying, monkeypatch):
    pytest.importorskip("openai", reason="the openai package is not installed")
    mock, screen, copied = copying(key="s3cret")
    screen.side_by_side()
    program = copied("Copy as Python")
    assert "s3cret" not in program
    monkeypatch.setenv("TRIMTAB_API_KEY", "s3cret")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout.replace("\n", "") == "don't <b>" * 2
    assert [body["model"] for body in mock.bodies] == ["tiny", "tiny:kivi:bits=2"]
    assert mock.bodies[0]["messages"][0]["content"] == 'It\'s "quoted" \\ $HOME `x`\nüñ😀'
    assert mock.bodies[0]["structured_outputs"]["json"] == {
        "type": "object",
        "additionalProperties": False,
        "default": None,
    }


def test_every_text_is_the_same_in_python(serve, open_page):
    screen = open_page(serve()[1])
    texts = ["", "'", '"', "\\", "😀", "${x}", "{x}", "\\u0041"]
    texts += ["\n\r\t\b\f\x00\x7f", "\u2028\u2029\x85\x0b\x1c"]
    body = {"model": "m", "prompt": texts, "logit_bias": {"5": -1.5}, "x": [True, False, None, 1e21, [], {}]}
    program = screen.module("snippets.js", "m.asPython([x])", {"path": "v1/completions", "body": body})
    (call,) = (
        node
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "create"
    )
    found = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
    assert found["prompt"] == texts
    assert found["extra_body"] == {"logit_bias": {"5": -1.5}, "x": [True, False, None, 1e21, [], {}]}
