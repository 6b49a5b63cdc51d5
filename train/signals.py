"""SIGTERM and SIGUSR1: finish the step, save, leave with exit code 75, on all ranks together."""

import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from data.errors import Interrupted


@dataclass(frozen=True)
class Decision:
    """What all ranks do after this step."""

    save: bool
    stop: bool


class Signals:
    """Collects what any rank was told, so that all ranks act at the same step.

    The ranks agree by an all-reduce that runs beside the next step: no step waits for it, and a
    signal takes effect one step later. On one process it takes effect at once.
    """

    def __init__(self, *, world_size: int, is_main: bool, save_minutes: float) -> None:
        self._world_size, self._is_main = world_size, is_main
        self._save_seconds = save_minutes * 60
        self._last_save = time.monotonic()
        self._signalled = False
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Interrupted):
            error.was_signalled = self._signalled

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def saved(self) -> None:
        """Starts the minutes until the next save anew."""
        self._last_save = time.monotonic()

    def poll(self) -> Decision:
        """After each step, on all ranks: what to do now."""
        agreed = self._finish()
        due = self._is_main and time.monotonic() - self._last_save >= self._save_seconds
        # What is about to be saved is not asked for once more.
        own = Decision(save=due and not agreed.save, stop=self._signalled)
        if self._world_size == 1:
            return own
        flags = torch.tensor([own.save, own.stop], dtype=torch.int32)
        self._pending = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True)
        return agreed

    def _finish(self) -> Decision:
        """What the ranks agreed on in the last poll."""
        if self._pending is None:
            return Decision(save=False, stop=False)
        flags, work = self._pending
        if work is not None:
            work.wait()
        self._pending = None
        save, stop = (bool(flag) for flag in flags.tolist())
        return Decision(save, stop)

    def drain(self) -> None:
        """Waits for what is still under way, before the process group ends."""
        self._finish()
