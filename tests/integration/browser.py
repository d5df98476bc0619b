"""A headless Chromium for tests, or the reason why there is none."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def browser_page() -> Iterator[Any]:
    """A page of Debian's Chromium (or M1_CHROMIUM), driven by playwright; skips without them."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("M1_CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium; install Debian's package or set M1_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, headless=True, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield browser.new_page(viewport={"width": 1100, "height": 760})
        finally:
            browser.close()
