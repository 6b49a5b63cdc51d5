"""Runs side by side: what each method reached at the same density, over all seeds.

Runs of other configurations are compared, and not averaged: each variant has rows of its own.

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

from launch.levels import compared, training_hours
from pruning.tickets import Ticket

_ALIKE = 1.1


@dataclass(frozen=True)
class Row:
    """One stage and method at one density, over the runs that have it."""

    group: float
    """the density as which it is compared: the largest of those that are alike"""
    variant: str
    """what tells the configuration of these runs from that of others; mostly empty"""
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
    hours: float | None
    """device-hours behind the accuracy, the mean over the runs; `None` where no rate is told"""

    @property
    def name(self) -> str:
        """The stage, a control's method, and what tells its configuration from others."""
        name = f"{self.stage}: {self.method}" if self.control else self.stage
        return f"{name} ({self.variant})" if self.variant else name

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """The largest accuracy less the smallest."""
        return max(self.accuracies) - min(self.accuracies)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean, "spread": self.spread}


@dataclass(frozen=True)
class Run:
    """What a run came to."""

    tickets: Sequence[Ticket]
    variant: str = ""
    """the label of its configuration"""
    num_devices: int = 1
    """GPUs, or processes without one, that it was trained on"""


def comparison(runs: Sequence[Run]) -> list[Row]:
    """The rows of all methods by density, the dense first, in the order of the stages of the runs,
    and of their variants."""
    found = [(run.variant, ticket) for run in runs for ticket in compared(run.tickets)]
    stages = list(dict.fromkeys(ticket.stage for _, ticket in found))
    variants = list(dict.fromkeys(run.variant for run in runs))
    rows = []
    for density in _common(found):
        here: dict[tuple[str, str, str, bool], list[tuple[Ticket, int]]] = defaultdict(list)
        for run in runs:
            alike = (t for t in compared(run.tickets) if _is_alike(t.density, density))
            last = {(t.stage, t.method, t.control): t for t in sorted(alike, key=lambda t: t.level)}
            for key, ticket in last.items():
                here[run.variant, *key].append((ticket, run.num_devices))
        order = sorted(here, key=lambda key: (stages.index(key[1]), variants.index(key[0]), key[3]))
        rows += [_row(density, *key, here[key]) for key in order]
    return rows


def _common(tickets: Iterable[tuple[str, Ticket]]) -> list[float]:
    """The densities to compare, the largest first: 1, and those that half of the stages reach.

    A stage counts once for each variant.
    """
    reached: dict[float, set[tuple[str, str]]] = {}
    for variant, ticket in sorted(tickets, key=lambda pair: -pair[1].density):
        alike = (one for one in reached if _is_alike(ticket.density, one))
        largest = next(alike, ticket.density)
        reached.setdefault(largest, set()).add((variant, ticket.stage))
    num_stages = len(set[tuple[str, str]]().union(*reached.values()))
    return [d for d, having in reached.items() if d == 1 or 2 * len(having) >= num_stages]


def _is_alike(density: float, largest: float) -> bool:
    """Whether a density counts as one of those of which `largest` is the largest.

    As dense counts only what is.
    """
    return density == largest or largest / _ALIKE < density < largest < 1


def _row(
    group: float,
    variant: str,
    stage: str,
    method: str,
    control: bool,
    found: Sequence[tuple[Ticket, int]],
) -> Row:
    tickets = [ticket for ticket, _ in found]
    hours = [training_hours(ticket) for ticket in tickets]
    known = [h * n for h, (_, n) in zip(hours, found, strict=True) if h is not None]
    return Row(
        group,
        variant,
        stage,
        method,
        control,
        density=statistics.mean(ticket.density for ticket in tickets),
        kept=statistics.mean(ticket.stored_masks.num_kept for ticket in tickets),
        accuracies=tuple(ticket.accuracy for ticket in tickets),
        steps=statistics.mean(ticket.total_steps for ticket in tickets),
        search_steps=statistics.mean(int(t.timing.get("search_steps", 0)) for t in tickets),
        hours=statistics.mean(known) if len(known) == len(found) else None,
    )
