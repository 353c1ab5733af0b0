import pytest

pytestmark = pytest.mark.slow

# Every text that is shown against what is behind it, by WCAG's formula. Disabled controls are exempt there.
CONTRASTS = """
() => {
  const rgb = color => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d');
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.unshift(rgb(getComputedStyle(at).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const found = [];
  const measure = (node, color, text) => {
    const below = behind(node);
    const dim = getComputedStyle(node).opacity;
    if (dim === '1') found.push([ratio(over(rgb(color), below), below), text.trim().slice(0, 40)]);
  };
  const shown = node => node.checkVisibility({visibilityProperty: true}) && !node.closest('.unseen, :disabled')
    && !node.closest('label:has(:disabled)');
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim() && shown(node))
      measure(node, getComputedStyle(node).color, walker.currentNode.data);
  }
  for (const field of document.querySelectorAll('input, textarea')) {
    if (field.placeholder && shown(field))
      measure(field, getComputedStyle(field, '::placeholder').color, field.placeholder);
  }
  return found;
}
"""
EDGES = CONTRASTS.replace(
    "const walker =",
    """for (const field of document.querySelectorAll(
      'input[type=number], input[type=password], select, textarea:not(#prompt), .box, .choice'))
    if (shown(field)) found.push([ratio(rgb(getComputedStyle(field).borderTopColor), behind(field.parentElement)), field.id]);
  return found;
  const walker =""",
)
UNNAMED = """
() => [...document.querySelectorAll('a, button, input, select, textarea, summary')]
  .filter(node => node.type !== 'range' && node.getAttribute('aria-hidden') !== 'true')
  .filter(node => !(node.labels?.length || node.textContent.trim() || node.getAttribute('aria-label')))
  .map(node => node.outerHTML)
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
    texts = screen.page.evaluate(CONTRASTS)
    assert len(texts) > 50
    assert [(round(ratio, 2), text) for ratio, text in texts if ratio < 4.5] == []
    screen.page.mouse.move(0, 0)
    screen.page.evaluate("document.activeElement.blur()")
    edges = screen.page.evaluate(EDGES)
    assert len(edges) > 10
    assert [(round(ratio, 2), name) for ratio, name in edges if ratio < 3] == []
    # The key's form has its own colours.
    _, locked = serve(key="k")
    texts = open_page(locked, color_scheme=scheme).page.evaluate(CONTRASTS)
    assert any("Use this key" in text for _, text in texts)
    assert [(round(ratio, 2), text) for ratio, text in texts if ratio < 4.5] == []


def test_everything_that_can_be_operated_has_a_name(serve, open_page):
    screen = everything(serve, open_page)
    assert screen.page.evaluate(UNNAMED) == []
    page = screen.page
    assert page.get_by_label("Left: model and plan").get_attribute("id") == "model-0"
    assert page.get_by_label("Temperature").count() == 1
    assert page.get_by_role("button", name="Copy as curl").count() == 1
    assert page.evaluate("[...document.querySelectorAll('[id]')].length - new Set([...document.querySelectorAll('[id]')].map(n => n.id)).size") == 0  # fmt: skip


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
    fields = ["system-0", "temperature-0", "top_p-0", "min_p-0", "top_k-0", "max_tokens-0", "seed-0", "stop-0"]
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
    mock, address = serve()
    screen = open_page(address)
    screen.type("say: にほん")
    screen.page.evaluate(
        "document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert screen.page.locator(".exchange").count() == 0


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
