"""A run over several seeds: all stages once for each of them, in a folder of its own.

`runs/NAME/seed-0`, `runs/NAME/seed-1` and so on are runs like any other: each resumes by itself,
and `tombola run` may be given some of the seeds here and others there. What they have in common is
that they are of one configuration, and the comparison of what they came to.
"""

import re
from dataclasses import dataclass

from data.errors import UserError
from data.files import Folder

_RUN = re.compile(r"seed-(\d+)")


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


def seed_name(seed: int) -> str:
    """The name of one run of several, which is that of its folder."""
    return f"seed-{seed}"


def seed_runs(folder: Folder) -> dict[int, Folder]:
    """The runs in the folder of a sweep by their seeds; none where it is the folder of a run."""
    names = folder.names()
    if "config.toml" in names:
        return {}
    found = {int(match[1]): folder / match[0] for match in map(_RUN.fullmatch, names) if match}
    return {seed: found[seed] for seed in sorted(found) if found[seed].exists("config.toml")}


def require_free(folder: Folder, *, for_seeds: bool) -> None:
    """Raises `UserError` where a run of one seed meets a sweep in its folder, or a sweep a run."""
    if for_seeds and folder.exists("config.toml"):
        raise UserError(f"{folder} is a run of one seed: choose another --name for several seeds")
    if not for_seeds and seed_runs(folder):
        raise UserError(
            f"{folder} holds runs of several seeds: choose another --name for a run of one"
        )
