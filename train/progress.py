"""What a person sees of a running training: a live line in a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from train.watch import Lap

_PLAIN_SECONDS = 10.0
MUCH_WAIT = 0.02
"""the share of a training's time from which on waiting for data is worth a word"""


@dataclass
class Status:
    """The latest that is known of the training under way."""

    phase: str = ""
    density: float = 1.0
    step: int = 0
    stop: int = 0
    images_per_second: float = 0.0
    data_wait: float = 0.0
    loss: float = float("nan")
    accuracy: float = float("nan")


class Display:
    """Shows a run on rank 0; does nothing elsewhere, or when `shown` is false."""

    def __init__(self, *, shown: bool) -> None:
        self._console = Console(quiet=not shown, highlight=False, soft_wrap=True)
        self.status = Status()
        self._planned = self._done = 0
        self._seconds = self._timed_steps = 0.0
        self._last_plain = time.monotonic()
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._work: TaskID | None = None
        if shown and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[facts]}"),
            )
            self._live = Progress(*columns, console=self._console, transient=True)
            self._live.start()

    def plan(self, num_steps: int) -> None:
        """Announces the optimizer steps of the stage, for the time that it will take."""
        self._planned, self._done = num_steps, 0

    def begin(self, phase: str, *, density: float, step: int, stop: int, start: int) -> None:
        """A phase from `start` to `stop` begins, or goes on at `step`."""
        self._done += step - start
        self.status = Status(phase, density, step, stop)
        if self._live is not None:
            if self._task is not None:
                self._live.remove_task(self._task)
            self._task = self._live.add_task(phase, total=stop, completed=step, facts="")

    def skip(self, num_steps: int) -> None:
        """A phase of that many steps was finished earlier."""
        self._done += num_steps

    def advance(self, *, step: int, lap: Lap, loss: float) -> None:
        """The phase has reached `step`, in a lap since the last call."""
        steps = step - self.status.step
        self._done += steps
        self._timed_steps += steps
        self._seconds += lap.seconds
        self.status.step, self.status.loss = step, loss
        self.status.images_per_second, self.status.data_wait = lap.images_per_second, lap.data_wait
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, facts=self._facts())
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS:
            self.say(f"{self.status.phase}: {self._facts()}")

    def work(self, what: str, done: int, total: int) -> None:
        """Work outside the training has come so far; where it ends, its line goes."""
        count = f"{done:,} of {total:,}"
        if self._live is not None:
            if self._work is None:
                self._work = self._live.add_task(what, total=total, facts="")
            self._live.update(
                self._work, description=what, completed=done, total=total, facts=count
            )
            if done >= total:
                self._live.remove_task(self._work)
                self._work = None
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS:
            self.say(f"{what}: {count}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self._last_plain = time.monotonic()
        self._console.print(line, markup=False)

    def close(self) -> None:
        """Takes the live line away."""
        if self._live is not None:
            self._live.stop()

    def _facts(self) -> str:
        status = self.status
        facts = [
            f"density {status.density:.2%}",
            f"step {status.step:,}/{status.stop:,}",
            f"{status.images_per_second:,.0f} images/s",
            f"loss {status.loss:.4f}",
        ]
        if status.accuracy == status.accuracy:
            facts.append(f"accuracy {status.accuracy:.4f}")
        facts.append(f"ETA {self._eta()}")
        if status.data_wait >= MUCH_WAIT:
            facts.append(f"data wait {status.data_wait:.0%}")
        return "  ".join(facts)

    def _eta(self) -> str:
        if not self._timed_steps:
            return "-"
        left = max(0, self._planned - self._done) * self._seconds / self._timed_steps
        return duration(left)


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: `1:02:03`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
