"""What a word on the command line names: a run, a store of tickets, or one ticket."""

import contextlib
from collections.abc import Sequence

from data.errors import RunError, UserError, did_you_mean
from data.files import Folder
from launch.grid import runs_below
from pruning.store import TicketFolder, Tickets, open_tickets
from pruning.tickets import Ticket, find_ticket


def find_tickets(place: str, root: str) -> Tickets:
    """A run or a store by path or URL, or a run by its name under `root`."""
    for candidate in candidates(place, root):
        with contextlib.suppress(UserError):
            return open_tickets(candidate)
    runs = find_runs(place, root)
    if runs:
        raise UserError(f"{place}: holds several runs: name one of them, as {runs[0]}")
    if "://" in place:
        return open_tickets(place)  # which says what is wrong
    near = did_you_mean(place, Folder(root).names())
    raise UserError(
        f"{place}: no run and no ticket store there, and no run of that name under {root}{near}"
    )


def find_runs(place: str, root: str) -> list[Folder]:
    """The runs of a place that holds several, over seeds or other axes; none where it does not."""
    for candidate in candidates(place, root):
        runs = runs_below(Folder(candidate))
        if runs:
            return list(runs.values())
    return []


def find_one(place: str, root: str) -> Ticket:
    """A ticket without its masks' bits: RUN/STAGE/LEVEL, STORE/ID, or the sparsest of a run.

    Raises `UserError` if there is none, `RunError` if it is damaged.
    """
    return find_ticket(locate(place, root))


def locate(place: str, root: str) -> str:
    """Where `Ticket.load` finds what `find_one` gives. Raises as it does."""
    single = find_single(place, root)
    if single is not None:
        return single
    tickets = find_tickets(place, root)
    return f"{tickets.folder}/{choose(tickets, None).place}"


def find_single(place: str, root: str) -> str | None:
    """Where `Ticket.load` finds the one ticket that a place names, whole or damaged."""
    for candidate in candidates(place, root):
        try:
            find_ticket(candidate)
        except UserError:
            continue
        except RunError:
            pass  # damaged, but there
        return candidate
    return None


def choose(tickets: Tickets, name: str | None) -> Ticket:
    """One of several: by name, by stage and name, by the beginning of its id.

    Without a name the sparsest of the last stage that has tickets. Damaged ones do not hinder
    finding others. Raises `UserError`, or `RunError` where the one that is named is damaged.
    """
    places = tickets.places()
    if not places:
        raise UserError(f"{tickets.folder}: no finished ticket yet")
    if name is None:
        return _sparsest(tickets)
    for place in places:
        if place.endswith(f"/{name}"):
            return find_ticket(place)
    found = _readable(places)
    for ticket in found:
        if len(name) >= 6 and ticket.id.startswith(name):
            return ticket
    near = did_you_mean(name, [ticket.place for ticket in found])
    raise UserError(f"{tickets.folder}: no ticket {name!r}{near}")


def _sparsest(tickets: Tickets) -> Ticket:
    found = _readable(tickets.places())
    if not isinstance(tickets, TicketFolder):
        raise UserError(f"{tickets.folder}: name one of its {len(found)} tickets by its id")
    if not found:
        raise RunError(
            f"{tickets.folder}: all tickets are damaged: tombola tickets verify says how"
        )
    last = [t for t in found if t.stage == found[-1].stage and not t.control]
    return max(last or found, key=lambda t: t.level)


def _readable(places: Sequence[str]) -> list[Ticket]:
    """The tickets whose indexes are whole."""
    found = []
    for place in places:
        with contextlib.suppress(RunError, UserError):
            found.append(find_ticket(place))
    return found


def candidates(place: str, root: str) -> list[str]:
    """Where a place may be."""
    return [place] if "://" in place or place.startswith("/") else [place, f"{root}/{place}"]
