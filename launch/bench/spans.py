"""Where the time of a ticket's training goes, part by part.

The program runs as it is. While it is watched, the functions that make up a level are wrapped here,
so that no training code knows of it; what a function takes within another counts for the inner one.
"""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pruning.imp
import pruning.program
import train.loop
import train.session
from data.loader import MemoryLoader
from launch.bench.measure import wait_for_device
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from train.checkpoint import Checkpoints
from train.instruments import Instruments
from train.metrics import Recorder
from train.session import Session
from train.state import TrainState

TRAINING, DATA, EVALUATION, SAVING = "training steps", "waiting for data", "evaluation", "saving"
LAST_SAVE, RECORDING, CHOOSING = "committing the last save", "recording", "choosing masks"
SET_UP, WRITING, OTHER = "level set-up", "writing the ticket", "other"

_PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    TRAINING: ((train.session, "fit"),),
    EVALUATION: ((train.loop, "evaluate"), (Session, "evaluate")),
    SAVING: ((Checkpoints, "save"), (TrainState, "state_dict"), (Recorder, "sync")),
    LAST_SAVE: ((Checkpoints, "wait"), (Checkpoints, "__exit__")),
    RECORDING: ((Instruments, "record_training"), (Instruments, "record_evaluation")),
    CHOOSING: ((pruning.program, "_chosen"),),
    SET_UP: ((Session, "_begin"), (pruning.imp._Imp, "_rewound")),
    WRITING: (
        (pruning.program, "write_masks"),
        (pruning.program, "_describe"),
        (pruning.imp, "write_weights"),
        (TicketFolder, "choose_masks"),
        (TicketFolder, "write"),
    ),
}
"""what each is the time of: functions by where the program looks for them. `fit` holds the loop
and its steps; `Checkpoints.save` returns when the state is copied, and `wait` when it is written"""
SPANS = (*_PARTS, DATA, OTHER)


@dataclass(frozen=True)
class Level:
    """What the training of one ticket took."""

    name: str
    seconds: float
    """wall time, from looking for the ticket to its being written"""
    parts: dict[str, float]
    """of it, by `SPANS`"""

    @property
    def beside_training(self) -> float:
        """The share of all but the training steps and their images."""
        return 1 - (self.parts[TRAINING] + self.parts[DATA]) / self.seconds


class Stopwatch:
    """Wall seconds by name: time within an inner span is the inner one's alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A context whose time counts for `name`, within another span."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`function` in a span, at whose ends the GPU has done what it was given."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            wait_for_device()
            with self.span(name):
                result = function(*args, **kwargs)
                wait_for_device()
            return result

        return wrapper

    def timed_items(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`function`, which gives an iterator, with what each of its items takes in a span."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = function(*args, **kwargs)
            while True:
                with self.span(name):
                    item = next(items)
                yield item

        return wrapper


@contextlib.contextmanager
def watched() -> Iterator[list[Level]]:
    """A context in which each ticket that IMP trains on one process adds what it took to a list."""
    levels: list[Level] = []
    watch = Stopwatch()
    train_ticket = pruning.program.train_ticket

    def train_and_tell(*args: Any) -> Ticket:
        watch.seconds.clear()
        started = time.perf_counter()
        with watch.span(OTHER):
            ticket = train_ticket(*args)
        seconds = time.perf_counter() - started
        levels.append(Level(ticket.name, seconds, {name: watch.seconds[name] for name in SPANS}))
        return ticket

    with contextlib.ExitStack() as stack:
        for name, functions in _PARTS.items():
            for owner, attribute in functions:
                timed = watch.timed(getattr(owner, attribute), name)
                stack.enter_context(mock.patch.object(owner, attribute, timed))
        items = watch.timed_items(MemoryLoader.__iter__, DATA)
        stack.enter_context(mock.patch.object(MemoryLoader, "__iter__", items))
        stack.enter_context(mock.patch.object(pruning.imp, "train_ticket", train_and_tell))
        yield levels


def mean_level(levels: list[Level]) -> Level:
    """A level that takes in each part the mean of these."""
    num = len(levels)
    parts = {name: sum(level.parts[name] for level in levels) / num for name in SPANS}
    return Level("mean", sum(level.seconds for level in levels) / num, parts)
