"""What watches a training without holding it up: the loss's health, and the throughput."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data.errors import Diverged
from train.engine import Engine
from train.ranks import ALONE, Ranks


def diverged(step: int, what: object) -> Diverged:
    """The error of a training that after so many steps has something that is not a number."""
    return Diverged(
        f"after {step} steps {what}; no checkpoint holds it. Lower optimizer.lr or set train.clip, "
        "under another --name"
    )


class FirstStep:
    """The first step at which something was so, on the device: only reading it waits for that."""

    _NEVER = torch.iinfo(torch.int64).max

    def __init__(self, device: torch.device) -> None:
        self._step = torch.full((), self._NEVER, dtype=torch.int64, device=device)

    def note(self, found: Tensor, step: int) -> None:
        """Takes note of whether it was so at `step`: a bool tensor without dimensions."""
        self._step.masked_fill_(found & (self._step > step), step)

    def read(self, ranks: Ranks = ALONE) -> int | None:
        """The step, on any of the ranks; `None` where it never was."""
        step = int(ranks.reduce(self._step, "min"))
        return None if step == self._NEVER else step


class Health:
    """Remembers the first step with a non-finite loss, without waiting for the device."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._first_bad = FirstStep(engine.device)

    def watch(self, loss: Tensor, step: int) -> None:
        """Takes note of this rank's loss at `step`."""
        self._first_bad.note(~loss.isfinite(), step)

    def check(self) -> None:
        """Raises `Diverged` on all ranks if any rank's loss was not finite."""
        step = self._first_bad.read(self._engine)
        if step is not None:
            raise Diverged(
                f"the loss is not finite at step {step}; no checkpoint holds it. Lower "
                "optimizer.lr, set train.clip, or choose train.precision = 'bf16' instead of "
                "'fp16', under another --name"
            )


class Lap(NamedTuple):
    """A part of a training."""

    seconds: float
    """of wall time, pauses included"""
    images_per_second: float
    """without the pauses"""
    data_wait: float
    """the share of that time in which the next batch was waited for"""


class Throughput:
    """Images per second of training alone: evaluation and saving stop the clock."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._paused = self._waited = 0.0
        self._images = 0

    def count(self, images: int) -> None:
        """So many images were trained on since the last call."""
        self._images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which the clock stands still."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the training waits for its next batch."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started

    def lap(self) -> Lap:
        """What passed since the last lap."""
        now = time.perf_counter()
        wall = now - self._started
        trained = max(wall - self._paused, 1e-9)
        lap = Lap(wall, self._images / trained, self._waited / trained)
        self._started, self._images = now, 0
        self._paused = self._waited = 0.0
        return lap
