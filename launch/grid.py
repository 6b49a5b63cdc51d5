"""The runs that one command does: one alone, or a grid of them, of which each has its own folder.

A grid has axes: settings, with the values that each has in turn. That of the seeds is one of them,
and comes last: a run over several seeds is a grid without others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from data.errors import UserError
from data.files import Folder
from launch.claim import MAY_CHANGE, require_same
from launch.config import (
    COMMAND_LINE,
    OF_A_RUN,
    RunConfig,
    known_keys,
    read_command_line,
    read_config,
)
from launch.given import Given
from launch.recipes import RECIPES
from launch.sweep import axes_of, cell_name, runs_in, seed_name
from launch.variants import short
from train.settings import Settings

_SEEDS = ("seed", "seeds")


@dataclass(frozen=True)
class Axis:
    """A setting, and the values that it has in turn."""

    key: str
    """as on the command line, `stages.imp.rewind`"""
    values: tuple[str, ...]
    """as they were written, each of one word or several"""

    def words(self, value: str) -> tuple[str, ...]:
        """One of the values as an option."""
        return (f"--{self.key}", *value.split())


@dataclass(frozen=True)
class Grid:
    """Runs that differ in a few settings, or one alone."""

    name: str
    """of the folder that holds them all"""
    runs: Mapping[str, RunConfig]
    """by their places in it: `rewind-init/seed-0`; one alone is at the empty place, itself"""
    keys: frozenset[str] = frozenset()
    """in which they differ beside the seed"""

    @property
    def axes(self) -> tuple[str, ...]:
        """What tells the runs apart, as it stands in their names; nothing of one alone."""
        return axes_of(next(iter(self.runs)))

    @property
    def is_alone(self) -> bool:
        return not self.axes


def grid_of(config: RunConfig) -> Grid:
    """The runs of a configuration: one alone, or one for each of its seeds."""
    return Grid(config.settings.name, _over_seeds("", config))


def read_grid(path: str, overrides: Sequence[str]) -> Grid:
    """The runs of a file and a command line on which options with commas are axes.

    Raises `UserError` for what none of the runs could be, and as `read_config` does for any.
    """
    axes, seeds, plain = _axes(read_command_line(overrides))
    names = [short(axis.key, [*(other.key for other in axes), *OF_A_RUN]) for axis in axes]
    runs: dict[str, RunConfig] = {}
    known: dict[str, dict[str, Any]] = {}
    for values in product(*(axis.values for axis in axes)):
        chosen = [w for axis, value in zip(axes, values, strict=True) for w in axis.words(value)]
        config = read_config(path, [*plain, *seeds, *chosen])
        place = cell_name(names, values)
        document = config.named("run").with_seed(0).document()
        alike = [other for other, theirs in known.items() if theirs == document]
        if alike:
            raise UserError(
                f"{COMMAND_LINE}: {place} is the same configuration as {alike[0]}: give each value "
                "once, and of no option that every stage has otherwise"
            )
        known[place] = document
        runs |= _over_seeds(place, config)
        name = config.settings.name
    grid = Grid(name, runs, frozenset(_as_in_files(axis.key, config) for axis in axes))
    if grid.is_alone:
        raise UserError(
            f"{path}: no option has several values, as in --seed 0,1: use tombola run for one run"
        )
    return grid


def _over_seeds(place: str, config: RunConfig) -> dict[str, RunConfig]:
    """The runs of a configuration by their places, of which all begin with `place`."""
    above = f"{place}/" if place else ""
    if config.seeds:
        return {f"{above}{seed_name(seed)}": config.with_seed(seed) for seed in config.seeds}
    return {place: config.named(place) if place else config}


# The command line ------------------------------------------------------------------------


def _axes(options: Sequence[Given]) -> tuple[list[Axis], list[str], list[str]]:
    """The axes but for the seeds, and the words of these and of what is the same in all runs."""
    axes: list[Axis] = []
    seeds: list[str] = []
    plain: list[str] = []
    for option in options:
        if not any("," in word for word in option.words):
            plain += _written(option)
            continue
        axis = _axis(option)
        _require_once(axis.key, options)
        if axis.key in _SEEDS:
            seeds = ["--seeds", *axis.values]
        else:
            axes.append(axis)
    return axes, seeds, plain


def _written(option: Given) -> list[str]:
    first = "".join(f"={word}" for word in option.words[:1])
    return [f"--{option.key}{first}", *option.words[1:]]


def _axis(option: Given) -> Axis:
    told = f"--{option.key} {' '.join(option.words)}"
    if len(option.words) > 1:
        raise UserError(f'{told}: quote values of several words: --{option.key} "0.5 0.1,0.2"')
    values = tuple(" ".join(value.split()) for value in option.words[0].split(","))
    if "" in values:
        raise UserError(f"{told}: has an empty value: write values with one comma between two")
    again = [value for index, value in enumerate(values) if value in values[:index]]
    if again:
        raise UserError(f"{told}: names {again[0]} twice: give each value once")
    if option.key == "name":
        raise UserError(f"{told}: the runs have one name: give --name once, without a comma")
    if option.key.startswith(MAY_CHANGE):
        raise UserError(
            f"{told}: is no setting in which runs are compared, since it changes nothing in what "
            "is computed: give it one value"
        )
    return Axis(option.key, values)


def _require_once(key: str, options: Sequence[Given]) -> None:
    alike = _SEEDS if key in _SEEDS else (key,)
    given = [option for option in options if option.key in alike]
    if len(given) > 1:
        raise UserError(
            f"--{given[-1].key} {' '.join(given[-1].words)}: {alike[0]} is given twice: write all "
            "of its values once, with commas between them"
        )


def _as_in_files(key: str, config: RunConfig) -> str:
    """A key with its stage spelt as in the file."""
    section, _, rest = key.partition(".")
    stage, _, option = rest.partition(".")
    names = {one.name.replace("-", "_"): one.name for one in config.stages}
    return f"stages.{names[stage]}.{option}" if section == "stages" else key


# Folders ---------------------------------------------------------------------------------


def runs_below(folder: Folder) -> dict[str, Folder]:
    """The runs of a grid in the folder of all, by their places; none in that of one run."""
    kinds: list[type[Any]] = [Settings, *(recipe.config for recipe in RECIPES.values())]
    keys = (key for kind in kinds for key in known_keys(kind))
    return runs_in(folder, [key.rpartition(".")[2] for key in keys])


def runs_at(folder: Folder) -> dict[str, Folder]:
    """The runs of a folder by their places in it: itself at the empty place, or those of a grid."""
    return {"": folder} if folder.exists("config.toml") else runs_below(folder)


def require_room(grid: Grid, folder: Folder) -> None:
    """Raises `UserError` where runs are in the folder which these would not be compared with.

    All of a folder have the same axes, and are of one configuration but for the settings on them.
    """
    there = runs_at(folder)
    for place in there:
        if axes_of(place) != grid.axes:
            before, now = (_over(axes) for axes in (axes_of(place), grid.axes))
            raise UserError(f"{folder} holds {before}: choose another --name for {now}")
    some = next(iter(grid.runs.values()))
    for place, run in there.items():
        ours = grid.runs.get(place)
        require_same(run, ours or some, apart=frozenset() if ours else grid.keys.union(OF_A_RUN))


def _over(axes: Sequence[str]) -> str:
    return f"runs over {', '.join(axes)}" if axes else "one run"
