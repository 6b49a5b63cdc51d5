"""Into which jobs a run splits, and which of them need others' tickets."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.errors import UserError
from launch.config import RunConfig
from launch.parts import TICKETS, controls_of
from launch.submit.options import Split

_LONGEST = 40
"""letters of a name: Kubernetes allows 63 for a pod, with `-node-0-NODE-abcde` behind the name"""


@dataclass(frozen=True)
class Job:
    """What one job runs: `tombola run` with these words after its configuration."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What files are made of."""

    config: str
    """the path of the configuration's copy, beside the files"""
    text: str
    """its content"""
    overrides: tuple[str, ...]
    waves: list[list[Job]]


def waves(
    config: RunConfig, needs: Mapping[str, Sequence[str]], split: Sequence[Split]
) -> list[list[Job]]:
    """The jobs of a run; those of a wave need nothing but what the waves before it have made.

    `needs` has, for each stage, the earlier ones of which it takes tickets. Raises `UserError`
    where there is nothing to split.
    """
    _require_something(config, split)
    by_wave = _parts(config, needs, split)
    name = config.settings.name
    seeds: list[int | None] = list(config.seeds) if "seeds" in split else [None]
    found: list[list[tuple[str, tuple[str, ...]]]] = []
    for parts_here in by_wave:
        jobs = []
        for seed in seeds:
            own = () if seed is None else ("--seeds", str(seed))
            ending = "" if seed is None else f"-seed-{seed}"
            for parts in parts_here:
                only = ("--only", *parts) if parts else ()
                told = "-".join((f"{name}{ending}", *_told(parts)))
                jobs.append((told, (*own, *only)))
        found.append(jobs)
    return _named(found)


def _require_something(config: RunConfig, split: Sequence[Split]) -> None:
    if "seeds" in split and len(config.seeds) < 2:
        raise UserError("--split seeds: the run has one seed: give several, as --seeds 0 1 2")
    if "stages" in split and len(config.stages) < 2:
        raise UserError("--split stages: the run has one stage: leave it out")
    if "controls" in split and not any(map(controls_of, config.stages)):
        raise UserError("--split controls: no stage has controls that a job of its own may train")


def _parts(
    config: RunConfig, needs: Mapping[str, Sequence[str]], split: Sequence[Split]
) -> list[list[tuple[str, ...]]]:
    """The parts of each job, wave by wave; one job of no parts is the whole run."""
    if "stages" not in split and "controls" not in split:
        return [[()]]
    depth: dict[str, int] = {}
    for stage in config.stages:
        after = [depth[earlier] + 1 for earlier in needs[stage.name]]
        depth[stage.name] = max(after, default=0) if "stages" in split else 0
    found: dict[int, list[tuple[str, ...]]] = {}
    together: list[str] = []
    for stage in config.stages:
        controls = controls_of(stage) if "controls" in split else ()
        whole = f"{stage.name}:{TICKETS}" if controls else stage.name
        if "stages" in split:
            found.setdefault(depth[stage.name], []).append((whole,))
        else:
            together.append(whole)
        for control in controls:
            own = (f"{stage.name}:{control}",)
            found.setdefault(depth[stage.name] + 1, []).append(own)
    if together:
        found[0] = [tuple(together)]
    return [found[wave] for wave in sorted(found)]


def _told(parts: Sequence[str]) -> tuple[str, ...]:
    """What a job's name says of its parts."""
    return ("tickets",) if len(parts) > 1 else tuple(part.replace(":", "-") for part in parts)


def _named(found: Sequence[Sequence[tuple[str, tuple[str, ...]]]]) -> list[list[Job]]:
    """The jobs of these names and words; what would be named alike gets a digest of both."""
    times = Counter(label(name) for wave in found for name, _ in wave)
    return [
        [
            Job(label(name, "" if times[label(name)] == 1 else "\0".join(words)), words)
            for name, words in wave
        ]
        for wave in found
    ]


def label(name: str, apart: str = "") -> str:
    """A name that every scheduler takes: a small letter, then these, digits and single '-'.

    One that is too long keeps both ends, and a digest of it and of what tells it `apart`.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")
    if len(plain) <= _LONGEST and not apart:
        return plain
    digest = hashlib.sha256(f"{name}\0{apart}".encode()).hexdigest()[:6]
    ends = (plain,) if len(plain) <= _LONGEST - 7 else (plain[:16], plain[-16:])
    return "-".join((*(end.strip("-") for end in ends), digest))
