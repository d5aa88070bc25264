"""A headless Chromium for tests of pages, driven by Playwright: Debian's, not one that Playwright would download."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, sync_playwright

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def launch() -> Iterator[Browser]:
    """A browser; closed behind.

    Raises:
        RuntimeError: there is none. A page that nothing has shown is not tested, so this is no reason to skip.
    """
    found = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if found is None:
        raise RuntimeError(f"none of {', '.join(_PROGRAMS)} is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        # As root, as in containers, Chromium has no sandbox; a container's /dev/shm is small.
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()
