"""Chromium without a window: a page as a person finds it, once its scripts have drawn it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_MS = 100_000
SETTLE_MS = 1000  # for what is asserted nowhere: colours, curves that grow
SCREENSHOTS = "BCT_SCREENSHOTS"  # environment: a folder to keep pictures in, docs/images for the docs
# What MLflow keeps in a browser that has been here before: its assistant does not open over a quarter of the page, and
# the menu is of training.
SETTINGS = {"mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True, "mlflow.workflowType_v1": "machine_learning"}


@dataclass(frozen=True)
class Browser:
    """A page, and a folder for its pictures."""

    page: Page
    folder: Path

    def open(self, url: str, *texts: str) -> str:
        """Open a page, wait until each of `texts` is visible, and return all of its visible text, on one line."""
        self.page.goto("about:blank")  # or what is behind a # alone is no new page
        self.page.goto(url)
        for text in texts:
            expect(self.page.locator("body")).to_contain_text(text, use_inner_text=True)
        return " ".join(self.page.inner_text("body").split())

    def picture(self, name: str) -> None:
        """Keep a picture of the page as it is now."""
        self.page.wait_for_timeout(SETTLE_MS)  # the pages poll, so the network is never idle
        self.page.screenshot(path=self.folder / f"{name}.png")
        if keep := os.environ.get(SCREENSHOTS):
            shutil.copy(self.folder / f"{name}.png", Path(keep) / f"{name}.png")


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """The browser that is installed; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)} (apt-get install chromium)")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, chromium_sandbox=os.geteuid() != 0)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        kept = json.dumps({key: json.dumps(value) for key, value in SETTINGS.items()})
        page.add_init_script(f"if (location.protocol === 'http:') Object.assign(localStorage, {kept})")
        try:
            yield Browser(page, folder)
        finally:
            browser.close()
