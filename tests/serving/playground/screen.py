"""The page as someone who uses it sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Whether something that takes its time comes to be."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return met


class Screen:
    """A browser's page with the few things that tests do on it."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def side_by_side(self) -> None:
        self.page.locator("#columns label", has_text="Side by side").click()

    def complete(self) -> None:
        self.page.locator("#mode label", has_text="Complete").click()

    def type(self, text: str) -> None:
        self.page.locator("#prompt").fill(text)

    def send(self, text: str) -> None:
        """Sends, without waiting for the answer."""
        self.type(text)
        self.page.locator("#prompt").press("Enter")

    def ask(self, text: str) -> None:
        """Sends, and waits until all is written."""
        self.send(text)
        self.page.wait_for_selector("#send", state="visible")

    def set(self, name: str, value: str, column: int = 0) -> None:
        field = self.page.locator(f"#{name}-{column}")
        for box in field.locator("xpath=ancestor::details").all():
            box.evaluate("box => box.open = true")
        field.select_option(value) if name == "form" else field.fill(value)

    @property
    def answers(self) -> list[str]:
        """The texts of the last exchange's answers, as they are shown."""
        return [text.inner_text() for text in self.last.locator(".text").all()]

    @property
    def last(self) -> Any:
        return self.page.locator(".exchange:visible").last

    @property
    def problems(self) -> list[str]:
        return self.page.locator(".problem:visible").all_inner_texts()

    def figures(self, column: int = 0) -> dict[str, str]:
        lines = self.last.locator(".answer").nth(column).locator(".figures div").all()
        return {line.locator("dt").inner_text(): line.locator("dd").inner_text() for line in lines}

    def until(self, expression: str) -> None:
        """Waits for the page; Playwright's own way to do it is forbidden by the page's policy."""
        assert eventually(lambda: self.page.evaluate(expression)), expression

    def module(self, name: str, expression: str, argument: Any = None) -> Any:
        """An expression of `m`, one of the page's modules, and `x`."""
        code = f"async x => {{ const m = await import('/playground/{name}'); return {expression}; }}"
        return self.page.evaluate(code, argument)
