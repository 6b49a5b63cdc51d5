"""What a run left behind, read once for all parts of its report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.files import Folder, Journal
from launch.claim import attempts, num_devices
from launch.config import RunConfig
from launch.levels import compared, gathered
from launch.variants import Variant, shortest
from pruning.connectivity import Connectivity
from pruning.tickets import Ticket
from train.metrics import is_journal


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

    @property
    def shown(self) -> list[Ticket]:
        """The tickets but for copies that were trained to measure a line."""
        return compared(self.tickets)

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
        attempts=attempts(folder),
        num_devices=num_devices(folder),
    )
