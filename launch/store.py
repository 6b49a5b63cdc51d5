"""`tombola tickets verify`, `copy`, `diff` and `gc`."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from data.errors import RunError, StoreError, UserError
from data.files import Folder
from launch.places import find_one, find_single, find_tickets
from launch.progress import WorkDisplay
from pruning import mpt
from pruning.overlap import Overlap, overlaps, total
from pruning.store import TicketFolder, collect, open_store, problem_of
from pruning.tickets import find_ticket

_HOUR = 3600.0
_SHORTEST_ON_STORES = 2


def verify_tickets(places: Sequence[str], *, root: str, as_json: bool) -> None:
    """Recomputes every digest and count of the tickets at these places.

    Raises `RunError` where anything is wrong.
    """
    if not places:
        raise UserError("name a ticket, a run or a store: tombola tickets verify runs/digits-imp")
    found = [one for place in places for one in _tickets_at(place, root)]
    rows: list[dict[str, str | None]] = []
    with WorkDisplay() as progress:
        for done, one in enumerate(found):
            progress("verifying tickets", done, len(found))
            problem, told = _verified(one)
            rows.append({"ticket": one, "problem": problem, "found": told})
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console = Console(highlight=False, soft_wrap=True, markup=False)
        for row in rows:
            console.print(f"{row['ticket']}: {row['problem'] or row['found']}")
    num_bad = sum(row["problem"] is not None for row in rows)
    if num_bad:
        raise RunError(f"{num_bad} of {len(rows)} tickets cannot be used")


def _verified(place: str) -> tuple[str | None, str]:
    """What is wrong with a ticket or with the file of one, if anything, and what was found."""
    if not _is_file(place):
        return problem_of(place), "whole"
    try:
        return None, f"whole: {mpt.verify(place)[1]}"
    except (RunError, UserError) as error:
        return str(error).removeprefix(f"{place}: "), ""


def copy_tickets(source: str, target: str, *, root: str, as_json: bool) -> None:
    """Copies a ticket, or all of a run or a store, into a store; what is there is left as it is."""
    store = open_store(target)
    places = _tickets_at(source, root)
    copied: dict[str, bool] = {}
    damaged: list[str] = []
    with WorkDisplay() as progress:
        for done, place in enumerate(places):
            progress("copying tickets", done, len(places))
            try:
                ticket = find_ticket(place)
                copied[ticket.id] = store.add(ticket)
            except StoreError:
                raise
            except RunError as error:
                damaged.append(str(error))
    if as_json:
        print(json.dumps([{"id": one, "copied": new} for one, new in copied.items()], indent=1))
    else:
        console = Console(highlight=False, soft_wrap=True, markup=False)
        for one, new in copied.items():
            console.print(f"{target.rstrip('/')}/{one}.json" + ("" if new else " was there"))
    if damaged:
        raise RunError(f"{len(damaged)} of {len(places)} tickets not copied: {damaged[0]}")


def require_store(url: str) -> None:
    """Raises `UserError` where tickets cannot be copied to, before there are any."""
    open_store(url)


def publish(runs: Sequence[Folder], url: str) -> None:
    """Copies all finished tickets of runs into a store, beside others that do the same."""
    store = open_store(url)
    tickets = [ticket for run in runs for ticket in TicketFolder(run).all()]
    num_new = sum(store.add(ticket) for ticket in tickets)
    print(f"{url}: {len(tickets)} tickets of this run, {num_new} of them new")


def diff_tickets(first: str, second: str, *, root: str, as_json: bool) -> None:
    """Prints, layer by layer, how far the masks of two tickets agree."""
    tickets = find_one(first, root), find_one(second, root)
    one, other = (ticket.masks for ticket in tickets)
    bases = [ticket.model.basis or "identity" for ticket in tickets]
    if bases[0] != bases[1]:
        raise UserError(
            f"{first} and {second} keep coefficients of different bases ({bases[0]}, {bases[1]}): "
            "no weight of one is a weight of the other"
        )
    try:
        rows = overlaps(one, other)
    except ValueError as error:
        raise UserError(f"{first} and {second} are of different networks: {error}") from None
    if not rows:
        raise UserError(f"{first} and {second} have no layer in common")
    lacking = {
        "only in the first": set(one) - set(other),
        "only in the second": set(other) - set(one),
    }
    if as_json:
        document = {
            "all": _as_json(total(rows)),
            "layers": [_as_json(row) for row in rows],
            **{key.replace(" ", "_"): sorted(names) for key, names in lacking.items()},
        }
        print(json.dumps(document, indent=1))
        return
    table = Table("layer", "of", "kept", "added", "removed", "IoU", "by chance")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in [*rows, total(rows)]:
        counts = (row.size, row.common, row.added, row.removed)
        shares = (f"{row.iou:.4f}", f"{row.chance:.4f}")
        table.add_row(row.name, *(f"{count:,}" for count in counts), *shares)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for key, names in lacking.items():
        if names:
            console.print(f"{key}: {', '.join(sorted(names))}")


def collect_garbage(place: str, *, hours: float, dry_run: bool, root: str, as_json: bool) -> None:
    """Removes objects that no ticket names."""
    if not 0 <= hours < math.inf:
        raise UserError(f"--hours {hours}: must be a number from 0")
    tickets = find_tickets(place, root)
    if not tickets.folder.is_local and hours < _SHORTEST_ON_STORES:
        raise UserError(
            f"--hours {hours}: on an object store at least {_SHORTEST_ON_STORES}, since writers "
            "rely on what is younger than an hour"
        )
    found = collect(tickets, grace=hours * _HOUR, dry_run=dry_run)
    if as_json:
        print(json.dumps({"removed": [] if dry_run else found, "found": found}, indent=1))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for name in found:
        console.print(name)
    verb = "would be removed" if dry_run else "removed"
    console.print(f"{len(found)} files that no ticket names {verb}")


def _tickets_at(place: str, root: str) -> list[str]:
    """Where the ticket at a place is, or all of the run or the store there, or the file itself."""
    if _is_file(place):
        return [place]
    single = find_single(place, root)
    return find_tickets(place, root).places() if single is None else [single]


def _is_file(place: str) -> bool:
    """Whether it is the file of a multi-prize ticket: by its name, or as there is a file."""
    is_index = place.endswith((".json", ".toml"))
    return place.endswith(mpt.SUFFIX) or (not is_index and os.path.isfile(place))


def _as_json(row: Overlap) -> dict[str, object]:
    extra = {"added": row.added, "removed": row.removed, "iou": row.iou, "chance": row.chance}
    return {**asdict(row), **extra}
