"""Timing ways of doing the same work in turn, so that a noisy machine treats all alike."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from train.versions import software_versions


def interleaved(*works: Callable[[], object], rounds: int) -> list[list[float]]:
    """Wall seconds of each, `rounds` times in turn, after one uncounted round of all.

    The order is turned round with every round.
    """
    times: list[list[float]] = [[] for _ in works]
    for index in range(rounds + 1):
        pairs = list(zip(works, times, strict=True))
        for work, into in reversed(pairs) if index % 2 else pairs:
            started = time.perf_counter()
            work()
            wait_for_device()
            if index:
                into.append(time.perf_counter() - started)
    return times


def wait_for_device() -> None:
    """Waits until the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the ratios, pair by pair."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def report(result: dict[str, Any], *, as_json: bool) -> None:
    """Prints a result with the machine it was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    machine = {
        "device": device or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
    }
    if as_json:
        print(json.dumps({**result, "machine": machine}, indent=1))
        return
    console = Console(highlight=False, soft_wrap=True)
    for key, value in result.items():
        if isinstance(value, dict):
            console.print(key)
            for fact, number in value.items():
                _print(console, f"  {fact}", number)
        else:
            _print(console, key, value)
    console.print(f"{'measured on':24} {machine['device']}, {machine['threads']} threads")


def _print(console: Console, key: str, value: object) -> None:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    console.print(f"{key:24} {shown}")
