"""What can be told of a run that another process writes, from its files alone."""

import contextlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data.errors import RunError, UserError
from data.files import Folder
from launch.claim import attempts, read_run
from launch.config import RunConfig
from launch.levels import compared, level_rows
from launch.parts import promises
from launch.tailing import Tail
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from train.metrics import is_journal, journal_part

_SILENT = 300.0
"""seconds without a line that are long, however often there should be one"""
_LINES, _SAVES = 20, 3
"""as many of them are missing that it is no chance: lines, and on a store, saves"""


@dataclass(frozen=True)
class Now:
    """What a process has last told of its training."""

    part: str
    """of the run, of a process that does no more; else empty"""
    stage: str
    level: str
    step: int
    stop: int | None
    """the step at which this training ends, where it is told"""
    density: float | None
    loss: float | None
    accuracies: dict[str, float]
    """by split, of this training; the last of each"""
    images_per_second: float | None
    data_wait: float | None
    """the share of the time in which the next batch was waited for"""
    eta: float | None
    """seconds until this training ends"""
    age: float | None
    """seconds since the last line was written; `None` where the storage does not tell"""
    is_silent: bool
    """whether that is long"""


@dataclass(frozen=True)
class State:
    """What is known of a run."""

    run: str
    attempts: int
    host: str | None
    """of the last attempt"""
    world_size: int | None
    parts: list[Now]
    tickets: list[Ticket]
    """of the finished levels, controls among them"""
    num_finished: int
    """levels, without controls"""
    num_levels: int | None
    """that the run will have, where it is told"""
    num_damaged: int
    """lines that cannot be read"""

    @property
    def is_done(self) -> bool:
        """Whether all levels are finished, and what was trained last, as a control of the last."""
        finished = {(ticket.stage, ticket.name) for ticket in self.tickets}
        last = {(now.stage, now.level) for now in self.parts}
        return self.num_levels == self.num_finished > 0 and last <= finished

    def to_json(self) -> dict[str, Any]:
        shown = compared(self.tickets)
        stages = dict.fromkeys(ticket.stage for ticket in shown)
        facts = {key: value for key, value in vars(self).items() if key not in ("tickets", "parts")}
        return {
            **facts,
            "is_done": self.is_done,
            "parts": [asdict(part) for part in self.parts],
            "stages": {stage: level_rows(shown, stage) for stage in stages},
        }


@dataclass
class Watched:
    """A run that is looked at again and again; each time only what is new is read."""

    folder: Folder
    _tails: dict[str, Tail] = field(default_factory=dict)
    _tickets: dict[tuple[str, str], Ticket | None] = field(default_factory=dict)
    """by stage and level; `None` of one that is not finished yet"""
    _config: RunConfig | None = None
    _num_images: dict[str, int] = field(default_factory=dict)
    """of an epoch, by stage"""
    _num_levels: int | None = None
    _attempts: list[dict[str, Any]] = field(default_factory=list)

    def look(self) -> State:
        """What is known of it now. Raises `StoreError` where the store fails."""
        names = filter(is_journal, self.folder.names())
        tails = [self._tails.setdefault(name, Tail(self.folder, name)) for name in names]
        is_new = self._config is None
        for tail in tails:
            with contextlib.suppress(FileNotFoundError):  # it may go just now
                is_new |= tail.look()
        if is_new:
            self._read_facts()
        self._read_tickets(tails)
        found = [ticket for ticket in self._tickets.values() if ticket is not None]
        hardware = (self._attempts[-1].get("hardware") if self._attempts else None) or {}
        state = State(
            run=str(self.folder),
            attempts=len(self._attempts),
            host=hardware.get("host"),
            world_size=hardware.get("world_size"),
            parts=[now for tail in tails if (now := self._now(tail)) is not None],
            tickets=found,
            num_finished=sum(not ticket.control for ticket in found),
            num_levels=self._num_levels,
            num_damaged=sum(tail.num_damaged for tail in tails),
        )
        if not state.is_done:
            return state
        return replace(state, parts=[replace(now, is_silent=False) for now in state.parts])

    def _read_facts(self) -> None:
        """What the run has told of itself; what is not there, or is damaged, is left open."""
        with contextlib.suppress(FileNotFoundError, UserError):
            self._config = read_run(self.folder)
            self._num_levels = _num_levels(self._config, self.folder)
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            for stage, record in self.folder.read_json("data.json").items():
                counts = record["images"]["train"].values()
                self._num_images[stage] = sum(count for count, _ in counts)
        self._attempts = attempts(self.folder)

    def _read_tickets(self, tails: list[Tail]) -> None:
        for tail in tails:
            for record in tail.records:
                place = str(record.get("stage")), str(record.get("level"))
                self._tickets.setdefault(place, None)
        where = TicketFolder(self.folder)
        for (stage, level), ticket in self._tickets.items():
            if ticket is None:
                with contextlib.suppress(RunError):  # damaged: `tickets verify` tells of it
                    self._tickets[stage, level] = where.find(stage, level)

    # A part ------------------------------------------------------------------------------

    def _now(self, tail: Tail) -> Now | None:
        if not tail.records:
            return None
        last = tail.records[-1]
        place = last.get("stage"), last.get("level")
        here = [one for one in tail.records if (one.get("stage"), one.get("level")) == place]
        train: dict[str, Any] = next(
            (one for one in reversed(here) if one.get("event") == "train"), {}
        )
        timing = train.get("timing") or {}
        rate = timing.get("images_per_second")
        step, stop = int(last.get("step") or 0), train.get("stop")
        seconds = _seconds_of_step(train, rate, self._num_images.get(str(place[0])))
        age = self._age(tail.name)
        return Now(
            part=journal_part(tail.name),
            stage=str(place[0]),
            level=str(place[1]),
            step=step,
            stop=stop,
            density=train.get("density"),
            loss=train.get("loss"),
            accuracies={
                str(one.get("split")): one["accuracy"] for one in here if "accuracy" in one
            },
            images_per_second=rate,
            data_wait=timing.get("data_wait"),
            eta=None if stop is None or seconds is None else max(0, stop - step) * seconds,
            age=age,
            is_silent=age is not None and age > self._patience(seconds),
        )

    def _age(self, name: str) -> float | None:
        """Seconds since a file was written; clocks may differ, so that none is below 0."""
        try:
            age = self.folder.age(name)
        except FileNotFoundError:  # it has just gone
            return None
        return None if age is None else max(0.0, age)

    def _patience(self, seconds: float | None) -> float:
        """The seconds after which a line should have come, of steps that take so many."""
        if self._config is None:
            return _SILENT
        settings = self._config.settings
        patience = max(_SILENT, _LINES * settings.log.every * (seconds or 0.0))
        if self.folder.local_path is None:  # where a save brings the lines before it
            patience = max(patience, _SAVES * 60 * settings.checkpoint.minutes)
        return patience


def _seconds_of_step(
    train: dict[str, Any], rate: float | None, num_images: int | None
) -> float | None:
    """How long a step takes; from the images of an epoch, since a training may have batches of its
    own."""
    step, epoch = train.get("step"), train.get("epoch")
    if not (step and epoch and rate and num_images):
        return None
    return float(num_images * epoch / step / rate)


def _num_levels(config: RunConfig, folder: Folder) -> int | None:
    """How many levels a run will have, unless what it takes from elsewhere cannot be seen here."""
    try:
        promised = promises(config, folder).values()
    except (RunError, UserError):
        return None
    return sum(len(promise.models) for promise in promised if promise is not None)
