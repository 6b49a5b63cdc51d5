"""Where a run's facts are also sent: TensorBoard, Weights & Biases, MLflow.

They are for people to look at: `metrics.jsonl` has everything, and a resume reads that alone. So
one that fails while a training goes on is left out from then on, and the training goes on.
"""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from data.errors import RunError, UserError
from data.files import Folder

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
_PROJECT = "tombola"
_IDENTITY = "tombola.run"
"""the tag by which MLflow finds the run again"""
_BOUNDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""else a server that does not answer would hold up the training for minutes"""


@dataclass(frozen=True)
class Tracked:
    """The run, or the part of one, whose facts are sent."""

    folder: Folder
    name: str
    part: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """its configuration, by keys such as `train.total`"""
    is_new: bool = True
    """whether it has no facts yet"""

    @property
    def shown(self) -> str:
        """The name that people see."""
        return f"{self.name} {self.part}".strip()

    @property
    def identity(self) -> str:
        """Tells it from any other; the same in every attempt."""
        place = self.folder.location + self.part
        return hashlib.sha256(place.encode()).hexdigest()[:16]


class Trackers:
    """All of them that a run was given. Each is told once where it fails, and then left out."""

    def __init__(self, names: tuple[TrackerName, ...], run: Tracked) -> None:
        self._open: list[GeneralTracker] = []
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"log.trackers: {name} is not installed; pip install 'tombola[{name}]'"
                )
            try:
                self._open.append(_OPENED[name](run))
            except UserError:
                raise
            except Exception as error:
                self.finish()
                if run.is_new:
                    raise RunError(
                        f"log.trackers: {name} cannot be opened: {_told(error)}. Mend it, or leave "
                        "it out"
                    ) from error
                _say(name, error)

    def log(self, prefix: str, numbers: Mapping[str, float], step: int) -> None:
        """Sends numbers, whose names all begin with `prefix`, of a step."""
        self._each(lambda tracker: _log(tracker, prefix, dict(numbers), step))

    def flush(self) -> None:
        """Has all that was sent on the disk, where it goes to one."""
        self._each(_flush)

    def finish(self) -> None:
        """Closes all."""
        self._each(lambda tracker: tracker.finish())
        self._open.clear()

    def _each(self, act: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self._open):
            try:
                act(tracker)
            except Exception as error:  # whatever its client raises, the training is worth more
                self._open.remove(tracker)
                _say(tracker.name, error)


def _log(tracker: GeneralTracker, prefix: str, numbers: dict[str, float], step: int) -> None:
    if tracker.name == "wandb":  # its own step only rises, ours goes back to k at each level
        tracker.log({**numbers, f"{prefix}/step": step})
    else:
        tracker.log(numbers, step=step)


def _flush(tracker: GeneralTracker) -> None:
    if isinstance(tracker, TensorBoardTracker):
        tracker.tracker.flush()


def _say(name: str, error: Exception) -> None:
    line = f"log.trackers: {name} failed, and gets no more of this attempt: {_told(error)}"
    print(f"{line}; metrics.jsonl has all", file=sys.stderr)


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# Opening ---------------------------------------------------------------------------------


def _tensorboard(run: Tracked) -> GeneralTracker:
    if run.folder.local_path is None:
        raise UserError("log.trackers: tensorboard needs a run folder on a local disk")
    own = f"tensorboard/{run.part}" if run.part else "tensorboard"
    tracker = TensorBoardTracker(own, logging_dir=str(run.folder.local_path))
    tracker.start()
    if run.is_new:
        rows = [f"| {key} | {value} |" for key, value in run.settings.items()]
        tracker.tracker.add_text("configuration", "\n".join(["| | |", "|---|---|", *rows]), 0)
    return tracker


def _wandb(run: Tracked) -> GeneralTracker:
    tracker = WandBTracker(_PROJECT, name=run.shown, id=run.identity, resume="allow")
    tracker.start()
    tracker.store_init_configuration(dict(run.settings))
    return tracker


def _mlflow(run: Tracked) -> GeneralTracker:
    """MLflow's run of this run, which is made where there is none."""
    if "MLFLOW_TRACKING_URI" not in os.environ:
        raise UserError(
            "log.trackers: mlflow needs the variable MLFLOW_TRACKING_URI, as http://host:5000"
        )
    for name, value in _BOUNDS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    client = MlflowClient()
    project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
    experiment = client.get_experiment_by_name(project)
    number = client.create_experiment(project) if experiment is None else experiment.experiment_id
    found = client.search_runs([number], f"tags.`{_IDENTITY}` = '{run.identity}'", max_results=1)
    if found:
        tracker = MLflowTracker(project, run_id=found[0].info.run_id)
        tracker.start()
        return tracker
    tags = {_IDENTITY: run.identity, "tombola.folder": run.folder.location}
    made = client.create_run(number, tags=tags, run_name=run.shown)
    tracker = MLflowTracker(project, run_id=made.info.run_id)
    tracker.start()
    tracker.store_init_configuration(dict(run.settings))
    return tracker


_OPENED: dict[str, Callable[[Tracked], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
