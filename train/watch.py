"""What watches a training without holding it up: the loss's health, and the throughput."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from data.errors import RunError
from train.engine import Engine


class Health:
    """Remembers the first step with a non-finite loss, on the device, without waiting for it."""

    _NEVER = torch.iinfo(torch.int64).max

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._first_bad = torch.full((), self._NEVER, dtype=torch.int64, device=engine.device)

    def watch(self, loss: Tensor, step: int) -> None:
        """Takes note of this rank's loss at `step`."""
        self._first_bad.masked_fill_(~loss.isfinite() & (self._first_bad > step), step)

    def check(self) -> None:
        """Raises `RunError` on all ranks if any rank's loss was not finite."""
        step = int(self._engine.reduce(self._first_bad, "min"))
        if step != self._NEVER:
            raise RunError(
                f"the loss is not finite at step {step}; no checkpoint holds it. Lower "
                "optimizer.lr, set train.clip, or choose train.precision = 'bf16' instead of "
                "'fp16', under another --name"
            )


class Throughput:
    """Images per second of training alone: evaluation and saving stop the clock."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._paused = 0.0
        self._images = 0

    def count(self, images: int) -> None:
        self._images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which the clock stands still."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started

    def lap(self) -> tuple[float, float]:
        """Wall seconds, pauses included, and images per second since the last lap."""
        now = time.perf_counter()
        wall = now - self._started
        rate = self._images / max(wall - self._paused, 1e-9)
        self._started, self._paused, self._images = now, 0.0, 0
        return wall, rate
