"""Which of several runs are of one configuration, and in what the others differ from them.

Runs that differ in their seeds alone are one variant: what they came to is averaged. Settings that
change nothing in what is computed do not tell variants apart, and neither does a stage that only
one of two runs has.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.files import Folder
from launch.claim import MAY_CHANGE, read_run
from launch.config import OF_A_RUN, RunConfig, flat
from launch.sweep import is_seed_name

_MOST_NAMED = 3
"""of the settings that tell variants apart; where there are more, the places of their runs do"""
_MISSING = object()


@dataclass
class Variant:
    """Runs of one configuration, but for the seed."""

    settings: dict[str, Any]
    """of all of them, as `launch.config.flat` gives them; without names and seeds"""
    runs: list[Folder]
    configs: list[RunConfig]
    """of each of the runs"""
    label: str = ""
    """what tells it from the others: `rewind 5ep, lr 0.1`; empty where there is no other"""


def variants(runs: Sequence[Folder]) -> list[Variant]:
    """The runs by their configurations, in their order. Raises `UserError` as `read_run` does."""
    found: list[Variant] = []
    for run in runs:
        config = read_run(run)
        settings = _settings(config)
        alike = next((one for one in found if not _differing((one.settings, settings))), None)
        if alike is None:
            found.append(Variant(settings, [run], [config]))
        else:
            alike.settings |= settings
            alike.runs.append(run)
            alike.configs.append(config)
    for variant, label in zip(found, _labels(found), strict=True):
        variant.label = label
    return found


def differing(found: Sequence[Variant]) -> dict[str, list[Any]]:
    """The settings in which variants differ, with the value of each; `None` where it has none."""
    keys = _differing([one.settings for one in found])
    return {key: [one.settings.get(key) for one in found] for key in keys}


def _settings(config: RunConfig) -> dict[str, Any]:
    settings = flat(config.document())
    return {
        key: value
        for key, value in settings.items()
        if key not in OF_A_RUN and not key.startswith(MAY_CHANGE)
    }


def _differing(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of which two of the documents have other values, where both have the stage."""
    keys = dict.fromkeys(key for document in documents for key in document)
    stages = [{_stage(key) for key in document} for document in documents]
    found = []
    for key in keys:
        having = zip(documents, stages, strict=True)
        values = [d.get(key, _MISSING) for d, known in having if _stage(key) in known]
        if any(value != values[0] for value in values):
            found.append(key)
    return found


def _stage(key: str) -> str:
    """The stage whose setting it is; empty for one of all stages."""
    return key.split(".")[1] if key.startswith("stages.") else ""


def _labels(found: Sequence[Variant]) -> list[str]:
    """What tells each variant from the others: the settings, or the places of its runs."""
    if len(found) < 2:
        return [""] * len(found)
    keys = _differing([one.settings for one in found])
    if len(keys) > _MOST_NAMED:
        return shortest([_place(one) for one in found])
    return [
        ", ".join(f"{short(k, keys)} {_shown(one.settings[k])}" for k in keys if k in one.settings)
        for one in found
    ]


def _place(variant: Variant) -> str:
    """Where its runs are: their own folder, or the one that all seeds are in."""
    first = variant.runs[0]
    return str(first.parent if len(variant.runs) > 1 else first)


def shortest(paths: Sequence[str]) -> list[str]:
    """As much of the ends of paths as tells them apart; of a seed's run also the run's name."""
    parts = [path.split("/") for path in paths]
    enough = [2 if is_seed_name(path[-1]) else 1 for path in parts]
    names = list(paths)
    for more in range(max(map(len, parts), default=0)):
        names = ["/".join(p[-(e + more) :]) for p, e in zip(parts, enough, strict=True)]
        if len(set(names)) == len(names):
            break
    return names


def short(key: str, keys: Iterable[str]) -> str:
    """As much of a key's end as tells it from the others: `rewind`, `imp.rewind`."""
    others = [other.split(".") for other in keys if other != key]
    words = key.removeprefix("stages.").split(".")
    for length in range(1, len(words)):
        if all(other[-length:] != words[-length:] for other in others):
            return ".".join(words[-length:])
    return ".".join(words)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
