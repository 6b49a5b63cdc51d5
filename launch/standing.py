"""How far a run is: which of the levels that it will have are finished."""

from dataclasses import dataclass

from data.files import Folder
from launch.config import RunConfig
from launch.parts import TICKETS, Unit, promises
from pruning.connectivity_program import is_measured
from pruning.sources import Promise, unfinished
from pruning.tickets import INDEX


@dataclass(frozen=True)
class Standing:
    """What there is of a run."""

    num_finished: int
    """levels with their ticket; a stage of lines between networks counts as one level"""
    num_levels: int
    controls_left: bool
    """whether a control of the last level is still to come"""
    is_begun: bool

    def __str__(self) -> str:
        if not self.is_begun:
            return "not begun"
        if self.num_finished == self.num_levels and not self.controls_left:
            return "done"
        return f"{self.num_finished} of {self.num_levels} levels"


def standing(folder: Folder, config: RunConfig, units: list[Unit]) -> Standing:
    """How far these units of a run are. Raises `UserError` as `check_stages` does."""
    promised = promises(config, folder)
    num_finished = num_levels = 0
    controls_left = False
    for stage in config.stages:
        own = [unit.what for unit in units if unit.stage == stage.name]
        promise = promised[stage.name]
        if promise is None and own:
            num_levels += 1
            num_finished += is_measured(folder, stage.name, stage.config)
        elif promise is not None and own:
            num_levels += len(promise.models)
            num_finished += len(promise.models) - len(unfinished(folder, stage.name, promise))
            controls = [what for what in own if what != TICKETS]
            controls_left |= any(_is_left(folder / stage.name, promise, c) for c in controls)
    return Standing(num_finished, num_levels, controls_left, folder.exists("config.toml"))


def _is_left(stage: Folder, promise: Promise, control: str) -> bool:
    """Whether a control is not finished at the last level, which comes last."""
    return not (stage / f"level-{max(promise.models):02d}-{control}").exists(INDEX)
