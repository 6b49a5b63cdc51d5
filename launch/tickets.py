"""`tombola tickets list` and `show`."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from data.errors import RunError, UserError
from launch.places import choose, find_one, find_tickets
from pruning.cost import Cost, Costs
from pruning.signed_weights import GENERATOR, SignedWeights
from pruning.tickets import Ticket, find_ticket


def list_tickets(place: str, *, root: str, as_json: bool) -> None:
    """Prints every ticket of a run or a store; one whose index is damaged is shown as such."""
    tickets = find_tickets(place, root)
    found = [(one, _index(one)) for one in tickets.places()]
    if as_json:
        rows = [
            t.summary() if isinstance(t, Ticket) else {"place": one, "damaged": t}
            for one, t in found
        ]
        print(json.dumps(rows, indent=1))
        return
    table = Table("name", "id", "parent", "density", "kept", "test accuracy")
    table.columns[0].no_wrap = True
    for one, ticket in found:
        if not isinstance(ticket, Ticket):
            table.add_row(one.rpartition("/")[2][:12], "damaged: tombola tickets verify says why")
            continue
        reached = ticket.metrics.get("test", {}).get("accuracy")
        table.add_row(
            ticket.place,
            ticket.id[:8],
            (ticket.parent or "-")[:8],
            f"{ticket.density:.2%}",
            f"{ticket.stored_masks.num_kept:,}",
            "-" if reached is None else f"{reached:.4f}",
        )
    Console().print(table)


def _index(place: str) -> Ticket | str:
    """A ticket without bits, or what is wrong with its index."""
    try:
        return find_ticket(place)
    except (RunError, UserError) as error:
        return str(error)


def show_ticket(place: str, name: str | None, *, root: str, as_json: bool) -> None:
    """Prints one ticket, its lineage and its layers."""
    ticket = find_one(place, root) if name is None else choose(find_tickets(place, root), name)
    rows = ticket.masks.table()
    cost = Costs().of(ticket)
    if as_json:
        layers = [{**vars(row), "density": row.density} for row in rows]
        told = {"cost": None if cost is None else cost._asdict(), "layers": layers}
        print(json.dumps({**ticket.summary(), **told}, indent=1))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"{ticket.place}  {ticket.id}")
    lineage = (ticket.place, *(ancestor.place for ancestor in ticket.lineage))
    console.print(f"lineage   {' <- '.join(lineage)}")
    spec = ticket.model
    options = "".join(f", {name} {value}" for name, value in spec.arguments.items())
    console.print(f"model     {spec.name}{options}, {spec.num_classes} classes", markup=False)
    masks = ticket.stored_masks
    console.print(f"density   {ticket.density:.4%} ({masks.num_kept:,} of {masks.size:,})")
    start = ticket.weights_digest or "none: not found by weight rewinding"
    when = "chosen, never trained" if ticket.weights_are_final else f"step {ticket.step}"
    console.print(f"weights   {when}: {start[:40]}")
    console.print(f"stored    {_stored_bytes(ticket)}")
    if cost is not None:
        console.print(f"an image  {_of_an_image(cost)}")
    blocks = ticket.config.get("map")
    if isinstance(blocks, str) and blocks.isprintable():
        console.print(f"map       {blocks} (blocks of its parent: blocks here)")
    if ticket.total_steps:
        searched = int(ticket.timing.get("search_steps", 0))
        console.print(f"steps     {ticket.total_steps:,} in all, {searched:,} to find it")
    for split, values in ticket.metrics.items():
        console.print(f"{split:9} {_numbers(values)}")
    table = Table("layer", "shape", "kept", "of", "density")
    for row in rows:
        shape = "x".join(map(str, row.shape))
        table.add_row(row.name, shape, f"{row.kept:,}", f"{row.size:,}", f"{row.density:.2%}")
    console.print(table)


def _of_an_image(cost: Cost) -> str:
    image = "x".join(map(str, cost.image))
    return (
        f"{cost.flops:,} FLOPs dense, {cost.sparse_flops:,} without zeros ({image}); parameters "
        f"{cost.kept_parameters:,} of {cost.parameters:,}, {cost.bytes:,} bytes dense"
    )


def _stored_bytes(ticket: Ticket) -> str:
    weights = ticket.stored_weights
    text = f"masks {sum(ticket.stored_masks.objects.values()):,} bytes"
    if weights is None:
        return text
    text += f", weights {sum(weights.objects.values()):,} bytes"
    if isinstance(weights, SignedWeights):
        signs = "stored" if weights.seed is None else f"by {GENERATOR} from seed {weights.seed}"
        text += f", signs {signs}"
    return text


def _numbers(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {'-' if value is None else format(value, '.4f')}" for key, value in values.items()
    )
