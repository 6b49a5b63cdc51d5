"""Where a stage takes its tickets from: an earlier stage of the run, another run, a store."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from data.errors import UserError, did_you_mean
from data.files import Folder
from pruning import document
from pruning.masks import prunable_shapes
from pruning.tickets import INDEX, Ticket, find_ticket
from train.models import ModelConfig, ModelSpec

RECORD = "sources.json"
"""in the folder of a stage"""
_RECORD_KIND = "tombola-sources"
_LEVEL = re.compile(r"level-(\d+)")
Needed = Literal["start", "end", "masks"]
_ANY = {"num_classes": 10, "in_chans": 3}
"""of a network that is only looked at"""


class Found(NamedTuple):
    """A ticket, and the folder of its level if it is in a run."""

    ticket: Ticket
    level: Folder | None


def find_sources(where: str, place: str, levels: Sequence[int], run: Folder) -> list[Found]:
    """The tickets that a stage starts from, without the bits of their masks.

    `where` names the option that holds the place: an earlier stage, RUN/STAGE, RUN/STAGE/LEVEL or
    STORE/ID, as a path or URL or below the root of this run. `levels` chooses among those of a
    stage, in this order (default: the sparsest). Raises `UserError` where there is none, `RunError`
    where one is damaged.
    """
    where = f"{where} = {place!r}"
    folders = [_folder_of(place, run)]
    if not _is_stage(place) and "://" not in place and not place.startswith(("/", "~")):
        folders.append(run.parent / place.rstrip("/"))
    for folder in folders:
        found = {int(m[1]): m[0] for name in folder.names() if (m := _LEVEL.fullmatch(name))}
        whole = [level for level in found if (folder / found[level]).exists(INDEX)]
        if whole:
            chosen = _chosen(where, levels, whole)
            return [_in_run(folder / found[level]) for level in chosen]
    refusals = []
    for folder in folders:
        try:
            ticket = find_ticket(folder.url)
        except UserError as error:
            refusals.append(str(error))
            continue
        _chosen(where, levels, [ticket.level])
        return [_in_run(folder) if folder.exists(INDEX) else Found(ticket, None)]
    if any(folder.exists("config.toml") for folder in folders):
        raise UserError(f"{where}: is a run: name a stage or a level of it, as RUN/STAGE")
    raise UserError(f"{where}: {refusals[0]}; of RUN/STAGE, the sparsest level is taken")


def _is_stage(place: str) -> bool:
    """Whether a place is the name of a stage of the same run, not a path or URL."""
    return "/" not in place.rstrip("/")


def _folder_of(place: str, run: Folder) -> Folder:
    if _is_stage(place):
        return run / place.rstrip("/")
    return Folder(place.rstrip("/").removesuffix(f"/{INDEX}"))


def _chosen(where: str, levels: Sequence[int], known: Sequence[int]) -> list[int]:
    for level in levels:
        if level not in known:
            there = ", ".join(map(str, sorted(known)))
            raise UserError(f"{where}: there is no level {level} (there is {there})")
    return list(levels) or [max(known)]


def _in_run(folder: Folder) -> Found:
    return Found(find_ticket(folder.url), folder)


def check_levels(config: object) -> None:
    """For `__post_init__`: raises `ValueError` where `levels` names one twice."""
    levels: tuple[int, ...] = getattr(config, "levels")  # noqa: B009 - of any such class
    if len(set(levels)) < len(levels):
        raise ValueError(f"levels = {list(levels)}: names a level twice")


def require_weights(ticket: Ticket) -> None:
    """Raises `UserError` for a ticket without the state at step k, from which one would train."""
    if ticket.stored_weights is None:
        raise UserError(
            f"ticket {ticket.place} has no weights of step k, from which it could be trained: it "
            "was found by learning-rate rewinding or fine-tuning, or imported as masks alone; find "
            "one with mode = 'weights'"
        )


def is_of_channels(ticket: Ticket) -> bool:
    """Whether a ticket has masks of normalisations, too, since channels went whole."""
    return bool(ticket.stored_masks.shapes.keys() - prunable_shapes(ticket.outline()).keys())


# Before anything is trained ------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """What a stage will have made when it ends."""

    models: Mapping[int, ModelConfig]
    """the levels, and of which network the ticket of each will be"""
    no_weights: str = ""
    """why its tickets will have no weights of step k, if they will not"""
    of_channels: bool = False
    """whether they will have masks of normalisations, too"""


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before a stage of it: the stages that come earlier."""

    run: Folder
    earlier: Mapping[str, Promise]
    asked: set[str] = field(default_factory=set)
    """the earlier stages of which tickets were asked for"""

    def sources(
        self, where: str, place: str, levels: Sequence[int], *, needed: Needed = "start"
    ) -> list[tuple[int, ModelSpec]]:
        """The levels that `find_sources` will come to, and of which networks.

        `where` names the option that holds the place. Raises `UserError` where there will be no
        such tickets, or where they will lack what is `needed`: the weights of step k from which
        they start, those that they were trained to, which are only in a run, or no weights.
        """
        if not _is_stage(place):
            found = find_sources(where, place, levels, self.run)
            for one in found:
                one.ticket.require_fit()
                if needed == "start":
                    require_weights(one.ticket)
                elif needed == "end" and not one.level and not one.ticket.weights_are_final:
                    raise UserError(
                        f"{where} = {place!r}: is in a store, which has no trained weights; name "
                        "the level of a run"
                    )
            return [(one.ticket.level, one.ticket.model) for one in found]
        promise = self.earlier.get(place.rstrip("/"))
        if promise is None:
            raise UserError(f"{where} = {place!r}: {self._unknown(place)}")
        self.asked.add(place.rstrip("/"))
        chosen = _chosen(f"{where} = {place!r}", levels, list(promise.models))
        if promise.no_weights and needed == "start":
            raise UserError(f"{where} = {place!r}: {promise.no_weights}")
        return [(level, ModelSpec.of(promise.models[level], **_ANY)) for level in chosen]

    def of_channels(self, where: str, place: str, levels: Sequence[int]) -> bool:
        """Whether any of the tickets that `find_sources` will come to is one of channels."""
        if not _is_stage(place):
            found = find_sources(where, place, levels, self.run)
            return any(is_of_channels(one.ticket) for one in found)
        return self.earlier[place.rstrip("/")].of_channels

    def _unknown(self, place: str) -> str:
        near = did_you_mean(place, self.earlier)
        known = "there is no earlier stage with tickets"
        if self.earlier:
            known = f"earlier stages with tickets: {', '.join(self.earlier)}"
        return f"is no earlier stage{near} ({known}); a path or URL has a '/'"


# What a stage began with ---------------------------------------------------------------------


def claim_sources(run: Folder, stage: str, found: Sequence[Found]) -> None:
    """Records which tickets a stage began with; a later attempt must find the same.

    Raises `UserError` where it finds others, and has results of those before.
    """
    now = [[one.ticket.level, one.ticket.id] for one in found]
    before = recorded_sources(run, stage)
    if before == now:
        return
    if before is not None and set((run / stage).names()) - {RECORD}:
        ids = ", ".join(str(ticket_id)[:12] for _, ticket_id in before)
        raise UserError(
            f"{run / stage} was begun with other tickets ({ids}) than are there now: choose "
            "another --name"
        )
    document.write_document(run / stage, RECORD, _RECORD_KIND, {"tickets": now})


def recorded_sources(run: Folder, stage: str) -> list[list[Any]] | None:
    """Level and id of each ticket that a stage began with; `None` where it did not begin."""
    try:
        return document.read_document(
            run / stage,
            RECORD,
            _RECORD_KIND,
            lambda body: list(map(_recorded, document.sequence(body["tickets"], "tickets"))),
        )
    except FileNotFoundError:
        return None


def finished_levels(run: Folder, stage: str, controls: Sequence[str] = ()) -> list[int] | None:
    """The levels of a stage all of whose tickets are there, which needs its sources no more."""
    levels = [int(level) for level, _ in recorded_sources(run, stage) or ()]
    names = [
        f"level-{level:02d}{suffix}"
        for level in levels
        for suffix in ("", *(f"-{control}" for control in controls))
    ]
    whole = all((run / f"{stage}/{name}").exists(INDEX) for name in names)
    return levels if levels and whole else None


def unfinished(run: Folder, stage: str, promise: Promise) -> list[int]:
    """The levels that a stage has promised, and of which there is no ticket yet."""
    return [n for n in promise.models if not (run / f"{stage}/level-{n:02d}").exists(INDEX)]


def _recorded(value: Any) -> list[Any]:
    level, ticket_id = document.sequence(value, "a ticket")
    return [document.count(level, "level"), document.digest(ticket_id, "a ticket")]
