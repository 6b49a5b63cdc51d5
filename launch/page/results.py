"""What a run left behind, read once for all parts of its report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from data.files import Folder, Journal
from launch.claim import attempts, num_devices
from launch.config import RunConfig
from launch.levels import compared, gathered
from launch.variants import Variant, shortest
from pruning.connectivity import Connectivity
from pruning.tickets import Ticket
from train.metrics import is_journal


class Rate(NamedTuple):
    """The throughput at a record of the loss."""

    hours: float
    """of training before it"""
    rate: float
    """images/s"""
    wait: float
    """share of the time"""


@dataclass(frozen=True)
class Results:
    """Of one run."""

    folder: Folder
    variant: str
    """what tells its configuration from those of the others; empty where all have the same"""
    name: str
    """as the report names it"""
    seed: int
    batch_size: int
    """images of a global batch"""
    log_every: int
    """steps between two records"""
    tickets: Sequence[Ticket]
    """in the order of its stages"""
    lines: Sequence[Connectivity]
    journals: dict[str, list[dict[str, Any]]]
    """the records of each process that did a part of it, by the name of its file"""
    attempts: Sequence[dict[str, Any]]
    num_devices: int

    @cached_property
    def shown(self) -> list[Ticket]:
        """The tickets but for copies that were trained to measure a line."""
        return compared(self.tickets)

    @cached_property
    def rates(self) -> dict[str, list[Rate]]:
        """The throughput that each journal tells of, at each record of the loss."""
        return {file: self._rates(records) for file, records in self.journals.items()}

    @property
    def hours(self) -> float:
        """Device-hours of training that the journals tell of."""
        ends = (rates[-1].hours for rates in self.rates.values() if rates)
        return self.num_devices * sum(ends)

    def _rates(self, records: Iterable[dict[str, Any]]) -> list[Rate]:
        points, hours, last = list[Rate](), 0.0, ("", "", 0)
        for record in records:
            timing = record.get("timing") or {}
            rate = timing.get("images_per_second")
            if record.get("event") != "train" or not rate:
                continue
            step = int(record["step"])
            place = (str(record.get("stage")), str(record.get("level")), step)
            steps = step - last[2] if place[:2] == last[:2] and step > last[2] else self.log_every
            hours += steps * self.batch_size / rate / 3600
            points.append(Rate(hours, float(rate), float(timing.get("data_wait", 0.0))))
            last = place
        return points

    def anchor(self, ticket: Ticket) -> str:
        """Where in the page a ticket of this run is."""
        return f"ticket-{self.name}-{ticket.place}".replace("/", "-").replace(" ", "-")


def read_results(found: Sequence[Variant]) -> list[Results]:
    """The results of all runs of variants. Raises `UserError` or `RunError` for damaged ones."""
    runs = [
        (variant, folder, config)
        for variant in found
        for folder, config in zip(variant.runs, variant.configs, strict=True)
    ]
    stages = list(dict.fromkeys(s.name for _, _, config in runs for s in config.stages))
    names = shortest([str(folder) for _, folder, _ in runs])
    return [
        _read(folder, config, name, variant.label, stages)
        for (variant, folder, config), name in zip(runs, names, strict=True)
    ]


def _read(
    folder: Folder, config: RunConfig, name: str, variant: str, stages: Sequence[str]
) -> Results:
    tickets, lines = gathered(folder, stages)
    journals = [file for file in folder.names() if is_journal(file)]
    known = attempts(folder)
    return Results(
        folder=folder,
        variant=variant,
        name=name,
        seed=config.settings.seed,
        batch_size=config.settings.data.batch_size,
        log_every=config.settings.log.every,
        tickets=tickets,
        lines=lines,
        journals={file: Journal.read(folder, file) for file in journals},
        attempts=known,
        num_devices=num_devices(known),
    )
