"""Runs side by side: what each method reached at the same density, over all seeds.

A density is compared where at least half of the stages have a ticket of it; the dense networks
stand above. Two densities are taken for one where they differ by less than a tenth: rounds of
pruning, copies of blocks and whole channels do not hit a number exactly. Of several tickets of a
stage and method at one density the last level counts, as of a network that grew.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.levels import accuracy, compared
from pruning.tickets import Ticket

_ALIKE = 1.1


@dataclass(frozen=True)
class Row:
    """One stage and method at one density, over the runs that have it."""

    group: float
    """the density as which it is compared: the largest of those that are alike"""
    stage: str
    method: str
    control: bool
    density: float
    """the mean over the runs"""
    kept: float
    """weights kept, the mean over the runs"""
    accuracies: tuple[float, ...]
    """on the test images, a number a run"""
    steps: float
    """optimizer steps behind the accuracy, those of the search included; the mean over the runs"""
    search_steps: float
    """those of them that went into finding the masks"""

    @property
    def name(self) -> str:
        """The stage, and a control's method."""
        return f"{self.stage}: {self.method}" if self.control else self.stage

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """The largest accuracy less the smallest."""
        return max(self.accuracies) - min(self.accuracies)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean, "spread": self.spread}


def comparison(runs: Sequence[Sequence[Ticket]]) -> list[Row]:
    """The rows of all methods by density, the dense first, in the order of the stages of the runs.

    Each run is given by its tickets.
    """
    found = [ticket for run in runs for ticket in compared(run)]
    stages = list(dict.fromkeys(ticket.stage for ticket in found))
    rows = []
    for density in _common(found, len(stages)):
        here: dict[tuple[str, str, bool], list[Ticket]] = defaultdict(list)
        for run in runs:
            alike = (t for t in compared(run) if _is_alike(t.density, density))
            last = {(t.stage, t.method, t.control): t for t in sorted(alike, key=lambda t: t.level)}
            for key, ticket in last.items():
                here[key].append(ticket)
        order = sorted(here, key=lambda key: (stages.index(key[0]), key[2]))
        rows += [_row(density, *key, here[key]) for key in order]
    return rows


def _common(tickets: Iterable[Ticket], num_stages: int) -> list[float]:
    """The densities to compare, the largest first: 1, and those that half of the stages reach."""
    stages: dict[float, set[str]] = {}
    for ticket in sorted(tickets, key=lambda t: -t.density):
        largest = next((one for one in stages if _is_alike(ticket.density, one)), ticket.density)
        stages.setdefault(largest, set()).add(ticket.stage)
    return [d for d, reached in stages.items() if d == 1 or 2 * len(reached) >= num_stages]


def _is_alike(density: float, largest: float) -> bool:
    """Whether a density counts as one of those of which `largest` is the largest.

    As dense counts only what is.
    """
    return density == largest or largest / _ALIKE < density < largest < 1


def _row(group: float, stage: str, method: str, control: bool, tickets: Sequence[Ticket]) -> Row:
    return Row(
        group,
        stage,
        method,
        control,
        density=statistics.mean(ticket.density for ticket in tickets),
        kept=statistics.mean(ticket.stored_masks.num_kept for ticket in tickets),
        accuracies=tuple(map(accuracy, tickets)),
        steps=statistics.mean(ticket.total_steps for ticket in tickets),
        search_steps=statistics.mean(int(t.timing.get("search_steps", 0)) for t in tickets),
    )
