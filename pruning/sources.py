"""Where a stage takes its tickets from: an earlier stage of the run, another run, a store."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.errors import UserError, did_you_mean
from data.files import Folder
from pruning import document
from pruning.tickets import Ticket, find_ticket
from train.models import ModelConfig, ModelSpec

_LEVEL = re.compile(r"level-(\d+)")
_RECORD, _RECORD_KIND = "sources.json", "tombola-sources"
_ANY = {"num_classes": 10, "in_chans": 3}
"""of a network that is only looked at"""


@dataclass(frozen=True)
class Promise:
    """What a stage will have made when it ends, told before anything is trained."""

    model: ModelConfig
    levels: tuple[int, ...] | None = None
    """`None` where they are those of its own sources"""
    no_weights: str = ""
    """why its tickets will have no weights of step k, if they will not"""


class Found(NamedTuple):
    """A ticket, and the folder of its level if it is in a run."""

    ticket: Ticket
    level: Folder | None


def is_stage(place: str) -> bool:
    """Whether a place is the name of a stage of the same run, not a path or URL."""
    return "/" not in place


def find_sources(place: str, levels: Sequence[int], run: Folder) -> list[Found]:
    """The tickets that a stage starts from, without the bits of their masks.

    `place`: an earlier stage, RUN/STAGE, RUN/STAGE/LEVEL, STORE/ID, as a path or URL or below the
    root of this run. `levels` chooses among those of a stage (default: the sparsest). Raises
    `UserError` where there is none, `RunError` where one is damaged.
    """
    folders = [run / place] if is_stage(place) else [Folder(place)]
    if not is_stage(place) and "://" not in place and not place.startswith("/"):
        folders.append(run.parent / place)
    for folder in folders:
        found = {int(m[1]): m[0] for name in folder.names() if (m := _LEVEL.fullmatch(name))}
        whole = [level for level in found if (folder / found[level]).exists("ticket.json")]
        if whole:
            chosen = _chosen(place, levels, whole)
            return [_in_run(folder / found[level]) for level in chosen]
    for folder in folders:
        with contextlib.suppress(UserError):
            ticket = find_ticket(folder.url)
            _chosen(place, levels, [ticket.level])
            return [_in_run(folder) if folder.exists("ticket.json") else Found(ticket, None)]
    raise UserError(
        f"ticket = {place!r}: no ticket there: give the name of an earlier stage, RUN/STAGE, "
        "RUN/STAGE/LEVEL, or STORE/ID"
    )


def _chosen(place: str, levels: Sequence[int], known: Sequence[int]) -> list[int]:
    for level in levels:
        if level not in known:
            there = ", ".join(map(str, sorted(known)))
            raise UserError(f"levels = {list(levels)}: {place} has no level {level} (has: {there})")
    return sorted(set(levels)) or [max(known)]


def _in_run(folder: Folder) -> Found:
    return Found(find_ticket(folder.url), folder)


def require_weights(ticket: Ticket) -> None:
    """Raises `UserError` for a ticket without the state at step k, from which one would train."""
    if ticket.stored_weights is None:
        raise UserError(
            f"ticket {ticket.place} has no weights of step k, from which it could be trained: it "
            "was found by learning-rate rewinding or fine-tuning, or imported as masks alone; find "
            "one with mode = 'weights'"
        )


def foresee(
    where: str,
    place: str,
    levels: Sequence[int],
    *,
    earlier: Mapping[str, Promise],
    run: Folder,
    trained: bool = False,
) -> list[ModelSpec]:
    """The networks that `find_sources` will come to, told before anything is trained.

    `where` names the option that holds the place. Raises `UserError` where there will be no such
    tickets, or no weights of step k (with `trained`, these are not asked for).
    """
    if not is_stage(place):
        found = [one.ticket for one in find_sources(place, levels, run)]
        for ticket in found:
            if not trained:
                require_weights(ticket)
        return [ticket.model for ticket in found]
    if place not in earlier:
        near = did_you_mean(place, earlier)
        known = f"earlier stages: {', '.join(earlier)}" if earlier else "there is no earlier stage"
        raise UserError(
            f"{where} = {place!r}: is no earlier stage with tickets{near} ({known}); a path or URL "
            "has a '/'"
        )
    promise = earlier[place]
    if promise.levels is not None:
        _chosen(place, levels, promise.levels)
    if promise.no_weights and not trained:
        raise UserError(f"{where} = {place!r}: {promise.no_weights}")
    return [ModelSpec.of(promise.model, **_ANY)]


def claim_sources(run: Folder, stage: str, found: Sequence[Found]) -> None:
    """Records which tickets a stage began with; a later attempt must find the same.

    Raises `UserError` where it finds others.
    """
    now, folder = [one.ticket.id for one in found], run / stage
    try:
        before = document.read_document(
            folder, _RECORD, _RECORD_KIND, lambda body: document.digests(body["tickets"], "tickets")
        )
    except FileNotFoundError:
        document.write_document(folder, _RECORD, _RECORD_KIND, {"tickets": now})
        return
    if list(before) != now:
        raise UserError(
            f"{folder} was begun with other tickets ({', '.join(one[:12] for one in before)}, now "
            f"{', '.join(one[:12] for one in now)}): choose another --name"
        )
