"""`tombola tickets list RUN` and `tombola tickets show RUN [NAME]`."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from data.errors import UserError, did_you_mean
from data.files import Folder
from launch.summary import accuracy
from pruning.store import TicketFolder
from pruning.tickets import Ticket


def find_run(run: str, root: str) -> Folder:
    """A run by path, URL, or name under `root`. Raises `UserError` if there is none."""
    if Folder(run).exists("config.toml"):
        return Folder(run)
    if "://" not in run and (Folder(root) / run).exists("config.toml"):
        return Folder(root) / run
    near = did_you_mean(run, Folder(root).names())
    raise UserError(f"{run}: no run of that path, and none of that name under {root}{near}")


def list_tickets(run: str, *, root: str, as_json: bool) -> None:
    """Prints every finished ticket of a run."""
    tickets = TicketFolder(find_run(run, root)).all()
    if as_json:
        print(json.dumps([ticket.summary() for ticket in tickets], indent=1))
        return
    table = Table("name", "id", "parent", "density", "kept", "test accuracy")
    table.columns[0].no_wrap = True
    for ticket in tickets:
        table.add_row(
            f"{ticket.stage}/{ticket.name}",
            ticket.id[:8],
            (ticket.parent or "-")[:8],
            f"{ticket.density:.2%}",
            f"{ticket.stored_masks.num_kept:,}",
            f"{accuracy(ticket):.4f}",
        )
    Console().print(table)


def show_ticket(run: str, name: str | None, *, root: str, as_json: bool) -> None:
    """Prints one ticket, its lineage and its layers; the sparsest of the last stage by default."""
    folder = find_run(run, root)
    tickets = TicketFolder(folder).all()
    ticket = _choose(tickets, name, folder)
    if as_json:
        layers = [{**vars(row), "density": row.density} for row in ticket.masks.table()]
        print(json.dumps({**ticket.summary(), "layers": layers}, indent=1))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{ticket.stage}/{ticket.name}  {ticket.id}")
    console.print(f"lineage   {' <- '.join(_lineage(ticket, tickets))}")
    console.print(f"model     {ticket.model.name}, {ticket.model.num_classes} classes")
    masks = ticket.stored_masks
    console.print(f"density   {ticket.density:.4%} ({masks.num_kept:,} of {masks.size:,})")
    start = ticket.weights_digest or "none: not found by weight rewinding"
    console.print(f"weights   step {ticket.step}: {start[:40]}")
    for split, values in ticket.metrics.items():
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        console.print(f"{split:9} {numbers}")
    table = Table("layer", "shape", "kept", "of", "density")
    for row in ticket.masks.table():
        shape = "x".join(map(str, row.shape))
        table.add_row(row.name, shape, f"{row.kept:,}", f"{row.size:,}", f"{row.density:.2%}")
    console.print(table)


def _choose(tickets: Sequence[Ticket], name: str | None, folder: Folder) -> Ticket:
    if not tickets:
        raise UserError(f"{folder}: no finished ticket yet")
    if name is None:
        last = [t for t in tickets if t.stage == tickets[-1].stage and not t.control]
        return max(last or tickets, key=lambda t: t.level)
    for ticket in tickets:
        if name in (ticket.name, f"{ticket.stage}/{ticket.name}") or (
            len(name) >= 6 and ticket.id.startswith(name)
        ):
            return ticket
    near = did_you_mean(name, [f"{t.stage}/{t.name}" for t in tickets])
    raise UserError(f"{folder}: no ticket {name!r}{near}")


def _lineage(ticket: Ticket, tickets: Sequence[Ticket]) -> list[str]:
    by_id = {t.id: t for t in tickets}
    names = []
    current: Ticket | None = ticket
    while current is not None:
        names.append(f"{current.stage}/{current.name}")
        current = by_id.get(current.parent or "")
    return names
