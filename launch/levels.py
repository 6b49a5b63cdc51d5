"""What the stages of a run reached, level by level: what tables, pictures and JSON show."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data.files import Folder
from pruning.connectivity import Connectivity, all_results
from pruning.growth_measures import measures
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from train.stages import stages


def gathered(folder: Folder, stages: Sequence[str]) -> tuple[list[Ticket], list[Connectivity]]:
    """The tickets of a run and the lines that were measured in it, in the order of its stages."""

    def place(one: Ticket | Connectivity) -> int:
        return stages.index(one.stage) if one.stage in stages else len(stages)

    tickets, results = TicketFolder(folder).all(), all_results(folder)
    return sorted(tickets, key=place), sorted(results, key=place)


def level_rows(tickets: Sequence[Ticket], stage: str) -> list[dict[str, Any]]:
    """What a stage reached, level by level: accuracies of the ticket and of each control.

    Beside an elastic ticket stands what IMP reached on the same network in this run, at the
    nearest density.
    """
    in_stage = [ticket for ticket in tickets if ticket.stage == stage]
    rows = []
    for ticket in sorted((t for t in in_stage if not t.control), key=lambda t: t.level):
        controls = [t for t in in_stage if t.control and t.parent == ticket.id]
        row = {
            "level": ticket.level,
            **({"blocks": blocks(ticket)} if ticket.method == "growth" else {}),
            "density": ticket.density,
            "ticket": ticket.accuracy,
            **{control.method: control.accuracy for control in controls},
        }
        searched = _searched(ticket, tickets) if ticket.method == "elastic" else None
        if searched is not None:
            row |= {"imp": searched.accuracy, "imp_density": searched.density}
            row["gap"] = row["ticket"] - row["imp"]
        rates = {name: ticket.timing.get(name) for name in ("images_per_second", "data_wait")}
        rows.append({**row, **rates})
    return rows


def growth_rows(tickets: Sequence[Ticket], stage: str) -> list[dict[str, Any]]:
    """The measures of a stage that grew networks: a row a level of each of its recursions."""
    rows = []
    for ticket in (t for t in tickets if t.stage == stage and "growth" in t.metrics):
        beside = ticket.parent if ticket.control else ticket.id
        dense = (t for t in tickets if (t.stage, t.method, t.parent) == (stage, "dense", beside))
        place = {"method": ticket.method, "control": ticket.control, "level": ticket.level}
        place["blocks"] = blocks(ticket)
        rows.append({**place, **asdict(measures(ticket, next(dense, None)))})
    return sorted(rows, key=lambda row: (row["control"], row["method"], row["level"]))


def blocks(ticket: Ticket) -> str:
    """How many blocks each stage of a ticket's network has: 1-1-2."""
    return "-".join(str(stage.num_blocks) for stage in stages(ticket.outline()))


def training_hours(ticket: Ticket) -> float | None:
    """The wall time of the optimizer steps behind a ticket's accuracy, those of the search too, at
    the rate of its own training; `None` where none is told."""
    rate = ticket.timing.get("images_per_second")
    try:
        batch = int(ticket.config["settings"]["data"]["batch_size"])
    except (KeyError, TypeError, ValueError):
        return None
    return ticket.total_steps * batch / rate / 3600 if rate else None


def compared(tickets: Sequence[Ticket]) -> list[Ticket]:
    """The tickets but for stages of copies alone, which were trained to measure a line."""
    stages = {ticket.stage for ticket in tickets if not ticket.control}
    return [ticket for ticket in tickets if ticket.stage in stages]


def _searched(ticket: Ticket, tickets: Sequence[Ticket]) -> Ticket | None:
    """IMP's ticket of the same network and data with the nearest density, within a third of it."""
    searched = (t for t in tickets if t.method == "imp" and not t.control)
    known = [t for t in searched if (t.model, _data(t)) == (ticket.model, _data(ticket))]
    near = [t for t in known if 3 / 4 < t.density / ticket.density < 4 / 3]
    return min(near, key=lambda t: abs(t.density - ticket.density), default=None)


def _data(ticket: Ticket) -> tuple[Any, ...]:
    """On which data a ticket of a run was trained."""
    data = ticket.config["settings"]["data"]
    return data["source"], data["root"]
