"""What a run records: `metrics.jsonl` always, and trackers on request.

A line is a fact about the training, the same in every run of the same configuration; what depends
on the machine and the hour stands under `timing`. A resumed run meets facts that its first attempt
recorded already, and leaves them: no line is ever doubled.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.files import Folder, Journal
from train.trackers import Tracked, TrackerName, Trackers

_IDENTITY = ("event", "stage", "level", "split", "step", "image")
_NOT_TRACKED = (*_IDENTITY, "stop")


@dataclass(frozen=True)
class LogConfig:
    """What is recorded, and how often."""

    every: int = 50
    """steps between two records of the training loss"""
    trackers: tuple[TrackerName, ...] = ()
    """also send everything there"""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every = {self.every}: must be at least 1 step")


class Recorder:
    """Writes the facts of a run, on rank 0; without a folder, as elsewhere, it does nothing.

    `part` names what this process does of a run: then the facts are in a file of its own, and those
    that other processes have written by now are known. `settings` is the configuration, key by key.
    """

    def __init__(
        self,
        folder: Folder | None = None,
        *,
        run: str = "",
        config: LogConfig | None = None,
        part: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._journal = None if folder is None else Journal(folder, journal_name(part))
        own = [] if self._journal is None else self._journal.records
        records = list(own)
        if folder is not None:
            records += others_records(folder, part)
        self._known = {_identity(record) for record in records}
        self._timings: dict[tuple[str, str], dict[str, list[float]]] = {}
        self._replaced: Counter[tuple[str, str]] = Counter()
        self._curves: dict[tuple[str, str, str], dict[int, float]] = {}
        for record in records:
            self._remember(record)
        self._trackers: Trackers | None = None
        if folder is not None and config is not None and config.trackers:
            tracked = Tracked(folder, run, part, settings or {}, is_new=not own)
            self._trackers = Trackers(config.trackers, tracked)

    def record(self, fact: dict[str, Any], timing: dict[str, float] | None = None) -> None:
        """Adds a fact: `event`, `stage`, `level`, `step` (and `split`) say which, the rest what."""
        if self._journal is None or _identity(fact) in self._known:
            return
        self._known.add(_identity(fact))
        fact = {k: None if _is_no_number(v) else v for k, v in fact.items()}
        record = {**fact, "timing": timing} if timing else fact
        self._journal.append(record)
        self._remember(record)
        if self._trackers is not None:
            prefix = "/".join(
                str(fact[k]) for k in ("stage", "level", "split", "event") if k in fact
            )
            numbers = {
                f"{prefix}/{key}": value
                for key, value in {**fact, **(timing or {})}.items()
                if isinstance(value, int | float) and key not in _NOT_TRACKED
            }
            self._trackers.log(prefix, numbers, fact["step"])

    def timing(self, stage: str, level: str) -> dict[str, float]:
        """What a level's training took, `images_per_second` and `data_wait`: the medians over its
        records, of all attempts at it (rank 0; else 0)."""
        found = self._timings.get((stage, level), {})
        return {
            name: statistics.median(found[name]) if name in found else 0.0
            for name in ("images_per_second", "data_wait")
        }

    def num_replaced(self, stage: str, level: str) -> int:
        """How many training images of a level were replaced, over all attempts at it (rank 0)."""
        return self._replaced[stage, level]

    def curve(self, stage: str, level: str, split: str) -> dict[int, float]:
        """The accuracies of a level's training by their steps, over all attempts (rank 0)."""
        return dict(sorted(self._curves.get((stage, level, split), {}).items()))

    def _remember(self, record: dict[str, Any]) -> None:
        place = (str(record.get("stage")), str(record.get("level")))
        for name, value in (record.get("timing") or {}).items():
            self._timings.setdefault(place, {}).setdefault(name, []).append(value)
        if record.get("event") == "evaluation":
            curve = self._curves.setdefault((*place, str(record.get("split"))), {})
            curve[int(record["step"])] = record["accuracy"]
        if record.get("event") == "replaced":
            self._replaced[place] += 1

    def sync(self) -> None:
        """Makes the facts so far durable: a checkpoint must not know more than they tell."""
        if self._journal is not None:
            self._journal.sync()
        if self._trackers is not None:
            self._trackers.flush()

    def close(self) -> None:
        """Closes the file and the trackers."""
        if self._journal is not None:
            self._journal.close()
        if self._trackers is not None:
            self._trackers.finish()


def _identity(fact: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(fact.get(key) for key in _IDENTITY)


def _is_no_number(value: Any) -> bool:
    """JSON knows neither NaN nor infinity."""
    return isinstance(value, float) and not math.isfinite(value)


def journal_name(part: str = "") -> str:
    """The file of the facts that a process records which does a part of a run, or all of it."""
    return f"metrics-{part}.jsonl" if part else "metrics.jsonl"


def is_journal(name: str) -> bool:
    """Whether a file of a run holds facts."""
    return re.fullmatch(r"metrics(-.+)?\.jsonl", name) is not None


def journal_part(name: str) -> str:
    """The part of a run whose process wrote a file of facts; empty of one that does all of it."""
    return name.removeprefix("metrics").removesuffix(".jsonl").removeprefix("-")


def others_records(folder: Folder, part: str) -> list[dict[str, Any]]:
    """What other processes than that of `part` have recorded of a run by now."""
    names = [name for name in folder.names() if is_journal(name) and name != journal_name(part)]
    return [record for name in names for record in Journal.read(folder, name)]
