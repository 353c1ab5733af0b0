from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
UNNAMED = """
() => [...document.querySelectorAll('a, button, input, select, textarea, summary')]
  .filter(node => node.type !== 'range' && node.getAttribute('aria-hidden') !== 'true')
  .filter(node => !(node.labels?.length || node.textContent.trim() || node.getAttribute('aria-label')))
  .map(node => node.outerHTML)
"""
REPEATED = """
() => {
  const ids = [...document.querySelectorAll('[id]')].map(node => node.id);
  return ids.filter((id, i) => ids.indexOf(id) !== i);
}
"""
FOCUS = "() => { const at = document.activeElement; return at.id || at.value || at.textContent.trim(); }"


def everything(serve, open_page, **options):
    """A page with all kinds of things on it."""
    _, address = serve()
    screen = open_page(address, **options)
    screen.side_by_side()
    screen.ask("fork")
    screen.ask("break")
    screen.ask("fail")
    for box in screen.page.locator("details").all():
        box.evaluate("box => box.open = true")
    screen.page.locator("#form-0").select_option("regex", force=True)
    return screen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_fields_be_found(serve, open_page, scheme):
    screen = everything(serve, open_page, color_scheme=scheme)
    texts = screen.page.evaluate(CONTRAST, "texts")
    assert len(texts) > 50
    assert [(round(ratio, 2), text) for ratio, text in texts if ratio < 4.5] == []
    screen.page.mouse.move(0, 0)
    screen.page.evaluate("document.activeElement.blur()")
    edges = screen.page.evaluate(CONTRAST, "edges")
    assert len(edges) > 10
    assert [(round(ratio, 2), name) for ratio, name in edges if ratio < 3] == []
    # The key's form has its own colours.
    _, locked = serve(key="k")
    texts = open_page(locked, color_scheme=scheme).page.evaluate(CONTRAST, "texts")
    assert any("Use this key" in text for _, text in texts)
    assert [(round(ratio, 2), text) for ratio, text in texts if ratio < 4.5] == []


def test_everything_that_can_be_operated_has_a_name(serve, open_page):
    screen = everything(serve, open_page)
    assert screen.page.evaluate(UNNAMED) == []
    page = screen.page
    assert page.get_by_label("Left: model and plan").get_attribute("id") == "model-0"
    assert page.get_by_label("Temperature").count() == 1
    assert page.get_by_role("button", name="Copy as curl").count() == 1
    assert page.evaluate(REPEATED) == []


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(serve, open_page):
    screen = open_page(serve()[1])
    screen.side_by_side()
    page = screen.page
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.locator(".skip").focus()
    path = [page.evaluate(FOCUS)]
    outlines = []
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        path.append(page.evaluate(FOCUS))
        outlines.append(
            page.evaluate(
                """() => { const at = document.activeElement;
                  const ring = node => node && getComputedStyle(node).outlineStyle !== 'none';
                  return at.id === 'prompt' ? getComputedStyle(at.closest('.box')).boxShadow !== 'none'
                    : ring(at) || ring(at.nextElementSibling); }"""
            )
        )
    starters = [
        "Tell me a short story about a lighthouse.",
        "Write as JSON: In Oslo lives Paul Fox, a tailor aged 81.",
        "What did the old sailor say to the boy?",
    ]
    names = "system temperature top_p min_p top_k max_tokens seed stop"
    fields = [f"{name}-0" for name in names.split()]
    assert path == [
        "Skip to the message box", "chat", "2", "model-0", "model-1", *starters, "prompt", "send",
        "copy-curl", "copy-python", "same", "in-turn", *fields, "Penalties", "Structured output",
        "Back to defaults",
    ]  # fmt: skip
    assert all(outlines)


def test_a_whole_conversation_by_keyboard_alone(serve, open_page):
    mock, address = serve()
    screen = open_page(address)
    page = screen.page
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("say: one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert mock.bodies == []
    page.keyboard.press("Enter")
    screen.until("document.querySelector('.text')?.textContent === 'one\\ntwo'")
    assert mock.bodies[0]["messages"][-1]["content"] == "say: one\ntwo"
    page.wait_for_selector("#send", state="visible")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Enter")
    assert len(mock.bodies) == 1, "an empty message is not sent"
    # Two columns by arrow keys: a radio group is one stop.
    page.locator("#columns input[value='1']").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#model-1").is_visible()
    assert page.locator("#said").get_attribute("aria-live") == "polite"


def test_enter_that_ends_an_input_method_sends_nothing(serve, open_page):
    _, address = serve()
    screen = open_page(address)
    screen.type("say: にほん")
    screen.page.evaluate(
        "document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert screen.page.locator(".exchange").count() == 0
    screen.page.locator("#prompt").press("Enter")
    assert screen.page.locator(".exchange").count() == 1


@pytest.mark.parametrize("width", [320, 360, 768, 1000, 1920])
def test_no_width_scrolls_sideways(serve, open_page, width):
    _, address = serve()
    screen = open_page(address, width=width, height=640)
    wide = "document.scrollingElement.scrollWidth - innerWidth"
    assert screen.page.evaluate(wide) <= 0
    screen.side_by_side()
    screen.ask("say: " + "x" * 500 + " " + "<wide>" * 50)
    screen.ask("fork")
    assert screen.page.evaluate(wide) <= 0
    assert screen.page.locator(".exchange").last.locator(".figures").count() == 2


def test_settings_open_over_a_narrow_page_and_close_again(serve, open_page):
    mock, address = serve()
    screen = open_page(address, width=360, height=700, reduced_motion="reduce")
    page = screen.page
    assert page.locator("#temperature-0").is_hidden()
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate("document.activeElement.id") == "close-settings"
    screen.set("temperature", "0.5")
    page.keyboard.press("Escape")
    assert page.locator("#temperature-0").is_hidden()
    assert page.evaluate("document.activeElement.id") == "open-settings"
    screen.ask("say: x")
    assert mock.bodies[0]["temperature"] == 0.5
    # What is wrong in a closed panel is shown there.
    page.get_by_role("button", name="Settings").click()
    screen.set("seed", "99999999999999999999")
    page.get_by_role("button", name="Done").click()
    screen.ask("say: x")
    assert page.evaluate("document.activeElement.id") == "seed-0"


def test_who_wants_no_motion_sees_none(serve, open_page):
    screen = open_page(serve()[1], reduced_motion="reduce")
    screen.send("slow")
    screen.page.wait_for_selector(".writing")
    moving = "getComputedStyle(document.querySelector('.writing .text'), '::after').animationName"
    assert screen.page.evaluate(moving) == "none"
    screen.page.keyboard.press("Escape")
