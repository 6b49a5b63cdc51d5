"""What watches a training without holding it up: the loss's health, and the throughput."""

import time
from dataclasses import dataclass

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
                f"the loss is not finite at step {step}; the checkpoint before it stays. Lower "
                "optimizer.lr, set train.clip, or choose train.precision = 'bf16' instead of 'fp16'"
            )


class Throughput:
    """Images per second of training alone: evaluation and saving stop the clock."""

    def __init__(self) -> None:
        self._started = self._lap_started = time.perf_counter()
        self._paused = 0.0
        self._images = self._lap_images = 0
        self._lap_paused = 0.0

    def count(self, images: int) -> None:
        self._images += images

    def paused(self) -> "_Pause":
        """A context in which the clock stands still."""
        return _Pause(self)

    def lap(self) -> tuple[float, float]:
        """Wall seconds, pauses included, and images per second since the last lap."""
        now = time.perf_counter()
        wall = now - self._lap_started
        seconds = wall - (self._paused - self._lap_paused)
        rate = (self._images - self._lap_images) / max(seconds, 1e-9)
        self._lap_started, self._lap_paused, self._lap_images = now, self._paused, self._images
        return wall, rate

    @property
    def images_per_second(self) -> float:
        """Over the whole of this `fit`; 0 if nothing was trained."""
        seconds = time.perf_counter() - self._started - self._paused
        return self._images / max(seconds, 1e-9)


@dataclass
class _Pause:
    throughput: Throughput
    started: float = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.throughput._paused += time.perf_counter() - self.started
