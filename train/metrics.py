"""What a run records: `metrics.jsonl` always, TensorBoard and Weights & Biases on request.

A line is a fact about the training, the same in every run of the same configuration; what depends
on the machine and the hour stands under `timing`. A resumed run meets facts that its first attempt
recorded already, and leaves them: no line is ever doubled.
"""

import hashlib
import importlib.util
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from data.errors import UserError
from data.files import Folder, Journal

_IDENTITY = ("event", "stage", "level", "split", "step", "image")


@dataclass(frozen=True)
class LogConfig:
    """What is recorded, and how often."""

    every: int = 50
    """steps between two records of the training loss"""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """also send everything there"""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every = {self.every}: must be at least 1 step")


class Recorder:
    """Writes the facts of a run, on rank 0; without a folder, as elsewhere, it does nothing."""

    def __init__(
        self, folder: Folder | None = None, *, run: str = "", config: LogConfig | None = None
    ) -> None:
        self._journal = None if folder is None else Journal(folder, "metrics.jsonl")
        records = [] if self._journal is None else self._journal.records
        self._known = {_identity(record) for record in records}
        self._rates: dict[tuple[str, str], list[float]] = {}
        self._replaced: Counter[tuple[str, str]] = Counter()
        self._curves: dict[tuple[str, str, str], dict[int, float]] = {}
        for record in records:
            self._remember(record)
        config = config or LogConfig()
        self._trackers = [] if folder is None else _open_trackers(folder, run, config)

    def record(self, fact: dict[str, Any], timing: dict[str, float] | None = None) -> None:
        """Adds a fact: `event`, `stage`, `level`, `step` (and `split`) say which, the rest what."""
        if self._journal is None or _identity(fact) in self._known:
            return
        self._known.add(_identity(fact))
        fact = {k: None if _is_no_number(v) else v for k, v in fact.items()}
        record = {**fact, "timing": timing} if timing else fact
        self._journal.append(record)
        self._remember(record)
        prefix = "/".join(str(fact[k]) for k in ("stage", "level", "split", "event") if k in fact)
        numbers = {
            f"{prefix}/{key}": value
            for key, value in {**fact, **(timing or {})}.items()
            if isinstance(value, int | float) and key not in _IDENTITY
        }
        for tracker in self._trackers:
            if (
                tracker.name == "wandb"
            ):  # its own step only rises, ours goes back to k at each level
                tracker.log({**numbers, f"{prefix}/step": fact["step"]})
            else:
                tracker.log(numbers, step=fact["step"])

    def images_per_second(self, stage: str, level: str) -> float:
        """The median rate of a level's training, over all attempts at it (rank 0; else 0)."""
        rates = self._rates.get((stage, level))
        return statistics.median(rates) if rates else 0.0

    def num_replaced(self, stage: str, level: str) -> int:
        """How many training images of a level were replaced, over all attempts at it (rank 0)."""
        return self._replaced[stage, level]

    def curve(self, stage: str, level: str, split: str) -> dict[int, float]:
        """The accuracies of a level's training by their steps, over all attempts (rank 0)."""
        return dict(sorted(self._curves.get((stage, level, split), {}).items()))

    def _remember(self, record: dict[str, Any]) -> None:
        place = (str(record.get("stage")), str(record.get("level")))
        rate = (record.get("timing") or {}).get("images_per_second")
        if rate is not None:
            self._rates.setdefault(place, []).append(rate)
        if record.get("event") == "evaluation":
            curve = self._curves.setdefault((*place, str(record.get("split"))), {})
            curve[int(record["step"])] = record["accuracy"]
        if record.get("event") == "replaced":
            self._replaced[place] += 1

    def sync(self) -> None:
        """Makes the facts so far durable: a checkpoint must not know more than they tell."""
        if self._journal is not None:
            self._journal.sync()
        for tracker in self._trackers:
            if isinstance(tracker, TensorBoardTracker):
                tracker.tracker.flush()

    def close(self) -> None:
        """Closes the file and the trackers."""
        if self._journal is not None:
            self._journal.close()
        for tracker in self._trackers:
            tracker.finish()


def _identity(fact: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(fact.get(key) for key in _IDENTITY)


def _is_no_number(value: Any) -> bool:
    """JSON knows neither NaN nor infinity."""
    return isinstance(value, float) and not math.isfinite(value)


def _open_trackers(folder: Folder, run: str, config: LogConfig) -> list[GeneralTracker]:
    trackers: list[GeneralTracker] = []
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.trackers: {name} is not installed; pip install 'tombola[{name}]'")
        if name == "tensorboard":
            if folder.local_path is None:
                raise UserError("log.trackers: tensorboard needs a run folder on a local disk")
            trackers.append(TensorBoardTracker("tensorboard", logging_dir=str(folder.local_path)))
        else:
            identity = hashlib.sha256(folder.location.encode()).hexdigest()[:16]
            trackers.append(WandBTracker("tombola", name=run, id=identity, resume="allow"))
    for tracker in trackers:
        tracker.start()
    return trackers
