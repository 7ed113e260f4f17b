"""The browser that pages are tested in: playwright with Debian's Chromium.

Tests skip where either is missing; with PREFTUNE_BROWSER=required that is an error.
"""

import os
import shutil
from collections.abc import Iterator

import pytest

try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    sync_playwright = None

REQUIRED = os.environ.get("PREFTUNE_BROWSER") == "required"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

__all__ = ["REQUIRED", "Browser", "Page", "browser_or_skip", "launched"]


def browser_or_skip() -> None:
    """Skip the module that calls it where there is no browser and none is required."""
    if not REQUIRED and (sync_playwright is None or CHROMIUM is None):
        pytest.skip("needs playwright and chromium", allow_module_level=True)


def launched() -> "Iterator[Browser]":
    """A browser, for a fixture to yield from."""
    assert sync_playwright is not None, "PREFTUNE_BROWSER=required, and playwright is not installed"
    assert CHROMIUM is not None, "PREFTUNE_BROWSER=required, and there is no chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
