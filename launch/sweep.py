"""How the runs of one configuration are named that differ in a few settings, and found again.

The folder of such runs has one for each value of the settings, or each combination of values, and
in that one for each seed; either may be missing:

    NAME/rewind-init__lr-0.1/seed-0

Each is a run like any other: it resumes by itself, and several processes may be given some here and
others there. What they have in common is the axes, the settings in which they differ.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.files import Folder

_SEED = "seed"
_BETWEEN = "__"
"""of the axes in a name: of the signs that S3 calls safe, and no shell expands"""
_PLAIN = re.compile(r"[A-Za-z0-9.]([A-Za-z0-9._-]*[A-Za-z0-9.])?")
_PART = re.compile(r"\w[\w.]*-.+")
_LONGEST = 200
"""letters of a name: a file system takes 255 bytes"""


@dataclass(frozen=True)
class SweepConfig:
    """What a configuration says of its seeds."""

    seeds: tuple[int, ...] = ()
    """instead of seed: run all of it with each of these, in the folders NAME/seed-0, NAME/seed-1,
    and compare what comes of it, mean and spread"""

    def __post_init__(self) -> None:
        if self.seeds and min(self.seeds) < 0:
            raise ValueError(f"seeds = {min(self.seeds)}: must not be negative")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: give each once")


# Names -----------------------------------------------------------------------------------


def seed_name(seed: int) -> str:
    """The name of one run of several, which is that of its folder."""
    return f"{_SEED}-{seed}"


def is_seed_name(name: str) -> bool:
    """Whether it is the name of one run among those of several seeds."""
    return re.fullmatch(rf"{_SEED}-\d+", name) is not None


def cell_name(axes: Sequence[str], values: Sequence[str]) -> str:
    """The name of what has these values: `rewind-500it__lr-0.1`. No two have the same."""
    most = max(12, _LONGEST // max(1, len(axes)) - max(map(len, axes), default=0) - len(_BETWEEN))
    named = zip(axes, values, strict=True)
    return _BETWEEN.join(f"{axis}-{_as_name(value, most)}" for axis, value in named)


def _as_name(value: str, most: int) -> str:
    """A value as part of a name; with a digest of it where it cannot stand there as it is."""
    words = value.split(" ")
    plain = "--".join(words)
    fits = all(_PLAIN.fullmatch(w) and "--" not in w and _BETWEEN not in w for w in words)
    if fits and len(plain) <= most:
        return plain
    digest = hashlib.sha256(value.encode()).hexdigest()[:8]
    rest = re.sub(r"[^A-Za-z0-9.]+", "-", value)[: most - len(digest) - 1].strip("-")
    return f"{rest}-{digest}" if rest else digest


def axes_of(place: str) -> tuple[str, ...]:
    """The axes along which a run lies that is at this place in the folder of all: `rewind, seed`.

    None for the one run that is the folder itself.
    """
    parts = [part for folder in filter(None, place.split("/")) for part in folder.split(_BETWEEN)]
    return tuple(part.partition("-")[0] for part in parts)


# Folders ---------------------------------------------------------------------------------


def runs_in(folder: Folder, axes: Sequence[str]) -> dict[str, Folder]:
    """The runs in the folder of several by their places; none where it is that of one run.

    `axes`: what may be one, besides the seed. They come in the order of their values, numbers by
    their size.
    """
    known = {_SEED, *axes}
    found: dict[str, Folder] = {}
    if folder.exists("config.toml"):
        return found
    for name in _named(folder, known):
        if (folder / name).exists("config.toml"):
            found[name] = folder / name
        elif axes_of(name) != (_SEED,):
            seeds = [f"{name}/{seed}" for seed in _named(folder / name, {_SEED})]
            found |= {one: folder / one for one in seeds if (folder / one).exists("config.toml")}
    return found


def _named(folder: Folder, known: set[str]) -> Iterator[str]:
    """The names in a folder that a run may have along these axes."""
    for name in sorted(folder.names(), key=_order):
        parts = name.split(_BETWEEN)
        axes = (axis.rpartition(".")[2] for axis in axes_of(name))
        if all(map(_PART.fullmatch, parts)) and known.issuperset(axes):
            yield name


def _order(name: str) -> list[tuple[float, str]]:
    """By which names are sorted: 2 before 10."""
    return [
        (float(word), "") if re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", word) else (float("inf"), word)
        for word in re.split(r"((?<![.\w])\d+(?:\.\d+)?(?:e-?\d+)?|\d+)", name)
    ]
