"""Waiting for what comes sooner or later; how soon is never asserted, since machines are busy."""

import time
from collections.abc import Callable
from typing import Any

import pytest

PATIENCE = 600.0
"""seconds after which nothing will come any more: it hangs"""


def wait_for(fact: Callable[[], Any], *, what: str = "it", seconds: float = PATIENCE) -> Any:
    """Waits until a fact is there, and gives it. Fails after `seconds`, and names it: `what`."""
    end = time.monotonic() + seconds
    while not (value := fact()):
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)
    return value


def seconds_until(
    condition: Callable[[], object], *, what: str = "it", seconds: float = PATIENCE
) -> float:
    """Waits for a condition as `wait_for` does; the seconds that it took."""
    began = time.monotonic()
    wait_for(condition, what=what, seconds=seconds)
    return time.monotonic() - began
