from pathlib import Path

import pytest

from serving.playground.mock_server import FULL, KIVI, Mock, running
from serving.playground.screen import Screen

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="session")
def browser():
    """A real Chromium without a window; what needs it is skipped where it is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens an address in a browser of its own; a script error on the page fails the test."""
    contexts, wrong = [], []

    def open_page(address, width=1280, height=800, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
        page.goto(address)
        page.wait_for_selector("#model-0 option, #notice:not([hidden])", state="attached")
        return Screen(page)

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def serve():
    """Starts mocks; gives each with its address."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def serve(models=(FULL, KIVI), key=None):
            mock = Mock(list(models), key)
            return mock, stack.enter_context(running(mock))

        yield serve
