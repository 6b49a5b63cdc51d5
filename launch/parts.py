"""Parts of a run, which several processes do beside one another in its one folder.

A part is `STAGE` (all of it), `STAGE:tickets` (without its controls), or `STAGE:CONTROL` (one
control, beside tickets that are finished). All processes have the whole configuration; each locks
what it does, and records its facts in a file of its own.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data.errors import UserError, did_you_mean
from data.files import Folder
from launch.config import RunConfig, Stage
from launch.recipes import RECIPES
from pruning.sources import Outlook, Promise, unfinished

_LONGEST = 150
"""letters: a name of a file has at most 255"""
TICKETS = "tickets"
"""of a stage: its tickets without its controls"""


class Unit(NamedTuple):
    """What one process does as a whole: the tickets of a stage, or one of its controls."""

    stage: str
    what: str

    def __str__(self) -> str:
        return f"{self.stage}.{self.what}"


def controls_of(stage: Stage) -> tuple[str, ...]:
    """The controls of a stage that may be parts of their own."""
    controls = getattr(stage.config, "controls", ()) if RECIPES[stage.recipe].splits else ()
    return tuple(dict.fromkeys(controls))


def units_of(config: RunConfig, parts: Sequence[str] = ()) -> list[Unit]:
    """What these parts are, in the order of the run; of all of it without any.

    Raises `UserError` for a part that the run does not have, or that is named twice.
    """
    every = [
        Unit(stage.name, what) for stage in config.stages for what in (TICKETS, *controls_of(stage))
    ]
    if not parts:
        return every
    chosen: list[Unit] = []
    for part in parts:
        for unit in _meant(part, config, every):
            if unit in chosen:
                raise UserError(f"--only {part}: is named twice")
            chosen.append(unit)
    return [unit for unit in every if unit in chosen]


def _meant(part: str, config: RunConfig, every: Sequence[Unit]) -> list[Unit]:
    stage, colon, what = part.partition(":")
    names = [one.name for one in config.stages]
    if stage not in names:
        near = did_you_mean(stage, names)
        raise UserError(
            f"--only {part}: no stage named {stage!r}{near} (stages: {', '.join(names)})"
        )
    here = [unit for unit in every if unit.stage == stage]
    if not colon:
        return here
    known = [unit.what for unit in here]
    if what not in known:
        words = ", ".join(f"{stage}:{one}" for one in known)
        raise UserError(f"--only {part}: no such part{did_you_mean(what, known)} (parts: {words})")
    return [Unit(stage, what)]


def label(units: Sequence[Unit], config: RunConfig) -> str:
    """Names the files of a process that does these; empty for one that does all."""
    if list(units) == units_of(config):
        return ""
    words = []
    for stage in config.stages:
        own = [unit.what for unit in units if unit.stage == stage.name]
        whole = len(own) == 1 + len(controls_of(stage))
        words += [stage.name] if whole else [f"{stage.name}.{what}" for what in own]
    name = "+".join(words)
    if len(name) > _LONGEST:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f"{name[:_LONGEST]}+{digest}"
    return name


def stages_of(
    units: Sequence[Unit], config: RunConfig
) -> list[tuple[Stage, Mapping[str, tuple[str, ...]]]]:
    """The stages as a process runs them that does these units: with their controls alone.

    And for each what its tickets tell otherwise: all controls of the stage.
    """
    found: list[tuple[Stage, Mapping[str, tuple[str, ...]]]] = []
    for stage in config.stages:
        own = [unit.what for unit in units if unit.stage == stage.name]
        if own and len(own) < 1 + len(controls_of(stage)):
            controls = tuple(what for what in own if what != TICKETS)
            part = dataclasses.replace(stage.config, controls=controls)
            told = {"controls": tuple(stage.config.controls)}
            found.append((dataclasses.replace(stage, config=part), told))
        elif own:
            found.append((stage, {}))
    return found


def needs(config: RunConfig, folder: Folder) -> dict[str, tuple[str, ...]]:
    """The stages of a run in their order, and of which earlier ones each takes tickets.

    Raises `UserError` for a stage that is known to fail once those before it are trained.
    """
    return {stage: tuple(sorted(asked)) for stage, (asked, _) in _foreseen(config, folder).items()}


def promises(config: RunConfig, folder: Folder) -> dict[str, Promise | None]:
    """What each stage of a run will have made, as far as it tells. Raises as `needs` does."""
    return {stage: promise for stage, (_, promise) in _foreseen(config, folder).items()}


def check_stages(config: RunConfig, folder: Folder, units: Sequence[Unit] = ()) -> None:
    """Raises `UserError` for a stage that is known to fail once those before it are trained.

    And for units that need tickets which are not finished, and are not among the units.
    """
    foreseen = _foreseen(config, folder)
    doing = {unit.stage for unit in units if unit.what == TICKETS}
    for unit in units:
        needed = foreseen[unit.stage][0] | ({unit.stage} if unit.what != TICKETS else set())
        for stage in sorted(needed - doing):
            promise = foreseen[stage][1]
            missing = unfinished(folder, stage, promise) if promise is not None else []
            if missing:
                levels = ", ".join(map(str, missing))
                raise UserError(
                    f"--only {unit.stage}:{unit.what}: needs the tickets of stage {stage!r}, of "
                    f"which level {levels} is not finished in {folder}: run --only "
                    f"{stage}:{TICKETS} first"
                )


def _foreseen(
    config: RunConfig, folder: Folder
) -> Mapping[str, tuple[frozenset[str], Promise | None]]:
    """Stage by stage, of which earlier ones it takes tickets, and what it will have made."""
    earlier: dict[str, Promise] = {}
    found: dict[str, tuple[frozenset[str], Promise | None]] = {}
    for stage in config.stages:
        outlook = Outlook(folder, earlier)
        promise = RECIPES[stage.recipe].foresee(stage.name, stage.config, stage.settings, outlook)
        found[stage.name] = frozenset(outlook.asked), promise
        if promise is not None:
            earlier[stage.name] = promise
    return found
