"""Fixtures: a real Chromium that has no network, and pages opened in it from files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")

#: Remembers what the page's own policy has refused.
WATCH = """
window.refused = [];
document.addEventListener("securitypolicyviolation", (e) => refused.push(e.violatedDirective));
"""


@dataclass
class Opened:
    """A page in the browser, and what went wrong in it."""

    page: Page
    faults: list[str] = field(default_factory=list)

    @property
    def data(self) -> Any:
        """The data in the page."""
        return json.loads(self.page.text_content("#data") or "")

    def place(self, name: str) -> tuple[float, float]:
        """Where a component is on the screen."""
        data = self.data
        index = [node["name"] for node in data["nodes"]].index(name)
        number = 0
        if chosen := self.page.query_selector("input[name=layout]:checked"):
            number = [each["name"] for each in data["layouts"]].index(chosen.get_attribute("value"))
        layout = data["layouts"][number]
        return self.screen(layout["x"][index], layout["y"][index])

    def screen(self, x: float, y: float) -> tuple[float, float]:
        """Where a place of the circuit is on the screen."""
        view = self.page.eval_on_selector("#view", "v => ({...v.dataset})")
        box = self.page.locator("#view").bounding_box()
        assert box is not None
        scale = float(view["scale"])
        return box["x"] + float(view["x"]) + scale * x, box["y"] + float(view["y"]) + scale * y

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def until(self, condition: str) -> None:
        """Wait until a condition of the page holds; its policy forbids the browser's own way."""
        for _ in range(100):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"never true: {condition}")

    def shown(self) -> int:
        """How many edges are shown."""
        self.settle()
        return int(self.page.get_attribute("#view", "data-shown") or "-1")


Opener = Callable[..., Opened]


def executable() -> str | None:
    """A Chromium on this machine."""
    named = os.environ.get("CIRCUITLAB_CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window; tests are skipped where there is none."""
    path = executable()
    if path is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} on PATH, CIRCUITLAB_CHROMIUM not set")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Opener]:
    """Opens a document from a file; at the end nothing may have been asked for or have failed."""
    pages: list[Opened] = []

    def opened(document: str, *, width: int = 1440, height: int = 900, **context: Any) -> Opened:
        path = tmp_path / f"page-{len(pages)}.html"
        path.write_text(document, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": height}, **context)
        found = Opened(page)
        pages.append(found)

        def only_the_file(route: Route) -> None:
            if route.request.url == path.as_uri() or route.request.url.startswith("data:"):
                route.continue_()
            else:
                found.faults.append(f"asked for {route.request.url}")
                route.abort()

        def hear(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                found.faults.append(message.text)

        page.route("**/*", only_the_file)
        page.on("console", hear)
        page.on("pageerror", lambda error: found.faults.append(str(error)))
        page.on("dialog", lambda dialog: (found.faults.append(dialog.message), dialog.dismiss()))
        page.add_init_script(WATCH)
        page.goto(path.as_uri())
        found.settle()
        return found

    yield opened
    for each in pages:
        refused = each.page.evaluate("refused")
        each.page.close()
        assert each.faults == []
        assert refused == []
