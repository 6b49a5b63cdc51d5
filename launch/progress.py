"""How far a command has come, on stderr: a live line in a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_PLAIN_SECONDS = 10.0


class WorkDisplay:
    """Shows what is being done while the context lasts: `display(what, done, total)`.

    The work that is named as `images_of` counts images, and is shown with its images/s.
    """

    def __init__(self, *, images_of: str = "") -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._images_of = images_of
        self._what = ""
        self._began, self._first, self._done = time.monotonic(), 0, 0
        self._last_plain = self._began
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
            self._live = Progress(*columns, console=self._console, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Work has come so far."""
        if what != self._what:
            self._what, self._began, self._first = what, time.monotonic(), done
        self._done = done
        line = f"{what}: {done:,} of {total:,}"
        if what == self._images_of:
            line += f", {self.images_per_second:,.0f} images/s"
        if self._live is not None:
            if self._task is None:
                self._task = self._live.add_task("")
            self._live.update(self._task, description=line, completed=done, total=total)
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            self._console.print(line, markup=False)

    @property
    def images_per_second(self) -> float:
        """Of the latest work, since it began here."""
        seconds = time.monotonic() - self._began
        return (self._done - self._first) / seconds if seconds > 0 else 0.0
