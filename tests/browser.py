"""A real browser without a window, for tests of pages; they are skipped where there is none."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)


@contextmanager
def browser(downloads: Path, *, dark: bool = False, width: int = 1280) -> Iterator[Any]:
    """A browser that prefers light or dark pages, of that many pixels; files go to `downloads`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    preference = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    try:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        where = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        yield driver
    finally:
        driver.quit()


def requests(driver: Any) -> list[str]:
    """What the page asked for since it was last asked, itself included."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = (
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    )
    return [url for url in sent if not url.startswith(("data:", "blob:"))]
