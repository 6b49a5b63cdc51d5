"""Where tickets are kept: in the folder of a run, or in a store of their own, on any fsspec URL.

A store is `<id>.json` beside `objects/`. A run has the index of each ticket in the folder of its
level, and its objects in `tickets/objects/`. An index is written after the objects that it names,
so what is interrupted leaves objects that nobody names, and never half a ticket.
"""

from collections.abc import Iterator
from typing import Protocol

from data.errors import RunError, UserError
from data.files import Folder
from pruning.document import read_document, write_document
from pruning.mask_store import StoredMasks
from pruning.objects import Objects, is_torn, remove_old
from pruning.tickets import (
    INDEX,
    STORED,
    Ticket,
    find_ticket,
    read_index,
    read_stored,
    run_objects,
    write_index,
)

_CHOSEN, _CHOSEN_KIND = "masks.json", "tombola-masks"


class Tickets(Protocol):
    """A place with tickets."""

    folder: Folder
    objects: Objects

    def all(self) -> list[Ticket]:
        """Every ticket, without the masks' bits. Raises `RunError` where an index is damaged."""
        ...

    def places(self) -> list[str]:
        """Where `Ticket.load` finds each of them, damaged ones included."""
        ...

    def used(self) -> set[str]:
        """The digests of all objects that an index names. Raises `RunError` as `all` does."""
        ...

    def index_folders(self) -> list[Folder]:
        """The folders in which indexes are written."""
        ...


class TicketStore:
    """Tickets by their ids."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.objects = folder, Objects(folder / "objects")
        self._whole: set[str] = set()

    def all(self) -> list[Ticket]:
        """Every ticket, without the bits of its masks. Raises `RunError` for a damaged index."""
        found = (self._find(ticket_id) for ticket_id in self._ids())
        return [ticket for ticket in found if ticket is not None]

    def places(self) -> list[str]:
        """Where each ticket is, as `Ticket.load` takes it."""
        return [f"{self.folder}/{ticket_id}.json" for ticket_id in self._ids()]

    def used(self) -> set[str]:
        """The digests of the objects that tickets name."""
        return {one for ticket in self.all() for one in objects_of(ticket)}

    def index_folders(self) -> list[Folder]:
        """The folders that indexes are in."""
        return [self.folder]

    def add(self, ticket: Ticket) -> bool:
        """Copies a ticket here: its objects, verified, and then its index.

        Gives whether it was missing or damaged: a whole ticket that is there is left as it is.
        Raises `RunError` where the ticket itself is damaged.
        """
        if self._has(ticket.id):
            return False
        for sha256, num_bytes in objects_of(ticket).items():
            if sha256 not in self._whole:
                self._copy(ticket.objects, sha256, num_bytes)
                self._whole.add(sha256)
        write_index(ticket, self.folder, f"{ticket.id}.json")
        return True

    def _find(self, ticket_id: str) -> Ticket | None:
        """A ticket, or `None` where it has gone since it was listed."""
        try:
            return read_stored(self.folder, ticket_id)
        except FileNotFoundError:
            return None

    def _has(self, ticket_id: str) -> bool:
        """Whether a ticket is here with all of its objects; each is read once, and no more."""
        try:
            named = objects_of(read_stored(self.folder, ticket_id))
            for sha256 in named.keys() - self._whole:
                self.objects.get(sha256, named[sha256])
                self._whole.add(sha256)
        except (FileNotFoundError, RunError):
            return False
        return True

    def _copy(self, source: Objects, sha256: str, num_bytes: int) -> None:
        """Has an object here, whole, and too young to be collected."""
        try:
            self.objects.put(self.objects.get(sha256, num_bytes))
        except RunError:
            self.objects.write(source.get(sha256, num_bytes))

    def _ids(self) -> list[str]:
        return [match[1] for name in self.folder.names() if (match := STORED.fullmatch(name))]


class TicketFolder:
    """The tickets of a run: `<stage>/<name>/ticket.json`, and the objects that they share."""

    def __init__(self, run: Folder) -> None:
        self.folder, self.objects = run, run_objects(run)

    def find(self, stage: str, name: str) -> Ticket | None:
        """The ticket of that name, without bits, or `None` where it is not finished yet."""
        return self._read(self.folder / f"{stage}/{name}")

    def _read(self, level: Folder) -> Ticket | None:
        try:
            return read_index(level, INDEX, self.objects)
        except FileNotFoundError:
            return None

    def write(self, ticket: Ticket) -> None:
        """Commits a ticket, whose objects are there."""
        write_index(ticket, self.folder / f"{ticket.stage}/{ticket.name}", INDEX)

    def chosen_masks(self, stage: str, name: str) -> StoredMasks | None:
        """The masks with which a training began, or `None` where it did not begin yet."""
        try:
            return _read_chosen(self.folder / f"{stage}/{name}")
        except FileNotFoundError:
            return None

    def choose_masks(self, stage: str, name: str, masks: StoredMasks) -> None:
        """Writes down the masks with which a training begins: a resume has these, no others."""
        folder = self.folder / f"{stage}/{name}"
        write_document(folder, _CHOSEN, _CHOSEN_KIND, {"masks": masks.to_json()})

    def all(self) -> list[Ticket]:
        """Every ticket, without the bits of its masks. Raises `RunError` for a damaged index."""
        return [
            ticket for level in self._levels(INDEX) if (ticket := self._read(level)) is not None
        ]

    def places(self) -> list[str]:
        """Where each ticket is, as `Ticket.load` takes it."""
        return [str(folder) for folder in self._levels(INDEX)]

    def used(self) -> set[str]:
        """The digests of the objects that tickets name, and of masks that were chosen."""
        chosen = (_read_chosen(folder) for folder in self._levels(_CHOSEN))
        trained = {one for ticket in self.all() for one in objects_of(ticket)}
        return trained | {one for masks in chosen for one in masks.objects}

    def index_folders(self) -> list[Folder]:
        """The folders that indexes are in."""
        return [
            self.folder / f"{stage}/{name}"
            for stage in self.folder.names()
            for name in (self.folder / stage).names()
        ]

    def _levels(self, file: str) -> Iterator[Folder]:
        return (folder for folder in self.index_folders() if folder.exists(file))


def open_tickets(url: str) -> Tickets:
    """The run or the store at a place. Raises `UserError` where it is neither."""
    folder = Folder(url)
    if folder.exists("config.toml"):
        return TicketFolder(folder)
    if folder.exists("objects"):
        return TicketStore(folder)
    raise UserError(f"{folder}: neither a run nor a ticket store")


def open_store(url: str) -> TicketStore:
    """The store at a place, where tickets are to be written. Raises `UserError` for a run."""
    folder = Folder(url)
    if folder.exists("config.toml"):
        raise UserError(
            f"{folder}: is a run, which keeps its own tickets: name a folder for a store"
        )
    return TicketStore(folder)


def objects_of(ticket: Ticket) -> dict[str, int]:
    """The digests of the objects that a ticket names, with their bytes."""
    weights = ticket.stored_weights
    return ticket.stored_masks.objects | ({} if weights is None else weights.objects)


def collect(tickets: Tickets, *, grace: float, dry_run: bool = False) -> list[str]:
    """Removes objects that no index names and what broken writes left; gives their names.

    Only what is older than `grace` seconds: a younger object may belong to a ticket that is being
    written. Raises `RunError`, and removes nothing, where an index cannot be read.
    """
    removed = tickets.objects.collect(tickets.used(), grace=grace, dry_run=dry_run)
    for folder in tickets.index_folders():
        if folder.is_local and folder.url != tickets.objects.folder.url:
            torn = [name for name in folder.names() if is_torn(name)]
            removed += remove_old(folder, torn, grace=grace, dry_run=dry_run)
    return removed


def problem_of(place: str) -> str | None:
    """What is wrong with the ticket at a place, everything being recomputed; `None` if nothing."""
    try:
        ticket = find_ticket(place)
        ticket.require_fit()
        ticket.read()
        if ticket.stored_weights is not None:
            ticket.weights()
    except (RunError, UserError) as error:
        return str(error)
    return None


def _read_chosen(folder: Folder) -> StoredMasks:
    return read_document(
        folder, _CHOSEN, _CHOSEN_KIND, lambda body: StoredMasks.from_json(body["masks"])
    )
