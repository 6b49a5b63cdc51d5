"""Linear mode connectivity: the error on the straight line between two trained networks.

Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis (1912.05671). The
barrier is the highest error on the line less the mean of its two ends, on a data set. Below 2 %, on
training and test images, the two are connected; a ticket of which two trainings are connected is
stable.

Statistics of batch normalisation that are interpolated like weights fit no network on the line but
the ends, so by default they are taken anew at each point, from training batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from data.errors import Interrupted, UserError
from data.files import Folder
from data.loader import EvaluationSet
from pruning import document
from pruning.store import TicketFolder
from train.evaluate import evaluate
from train.rng import kept_generators
from train.session import Session

BatchNorm = Literal["recalibrate", "interpolate"]
STABLE = 0.02
"""the error barrier below which two networks are connected (1912.05671, section 3)"""
_RESULT, _RESULT_KIND = "connectivity.json", "tombola-connectivity"


@dataclass(frozen=True)
class Curve:
    """Errors (1 - accuracy) at evenly spread points of the line, from the first network to the
    second, both included."""

    errors: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """The highest error less the mean of the ends; never negative."""
        return max(self.errors) - (self.errors[0] + self.errors[-1]) / 2


@dataclass(frozen=True)
class Connectivity:
    """The line between two networks, on each data set."""

    stage: str
    name: str
    first: str
    """place of the first network's training"""
    second: str
    density: float
    """of the first"""
    batchnorm: str
    """how its statistics were come by on the line, in words"""
    curves: dict[str, Curve]
    """train and test"""

    @property
    def is_connected(self) -> bool:
        """Whether the barrier is below 2 % on every data set."""
        return all(curve.barrier < STABLE for curve in self.curves.values())

    def to_json(self) -> dict[str, Any]:
        """All of it as a JSON document."""
        curves = {split: list(curve.errors) for split, curve in self.curves.items()}
        return {**vars(self), "curves": curves}

    @classmethod
    def from_json(cls, value: Any) -> "Connectivity":
        """Raises `ValueError` or `KeyError` where it is not what `to_json` gives."""
        row = document.mapping(value, "connectivity")
        texts = ("stage", "name", "first", "second", "batchnorm")
        return cls(
            density=document.fraction(row["density"], "density"),
            curves=document.table(_curve, row["curves"], "curves"),
            **{field: document.text(row[field], field) for field in texts},
        )


def described(result: Connectivity) -> str:
    """In one line: `stable/level-03: barrier 0.41 % on train, 0.28 % on test: stable (...)`."""
    parts = [f"{curve.barrier:.2%} on {split}" for split, curve in result.curves.items()]
    verdict = "connected" if result.is_connected else "not connected"
    place = f"{result.stage}/{result.name}"
    return f"{place}: barrier {', '.join(parts)}: {verdict} (BatchNorm: {result.batchnorm})"


def _curve(value: Any, what: str) -> Curve:
    errors = tuple(document.fraction(one, what) for one in document.sequence(value, what))
    if len(errors) < 2:
        raise ValueError(f"{what} has fewer than two points")
    return Curve(errors)


@dataclass(frozen=True)
class Line:
    """How a line is measured."""

    points: int = 30
    batchnorm: BatchNorm = "recalibrate"
    num_batches: int = 16
    """global training batches that statistics are taken from"""
    train_images: int | None = None
    """how many training images are evaluated, spread evenly (default: all)"""

    def __post_init__(self) -> None:
        if self.points < 3:
            raise ValueError(f"points = {self.points}: must be at least 3")
        for name in ("num_batches", "train_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")

    def treatment(self, model: nn.Module) -> str:
        """How the statistics of batch normalisation are come by, in words."""
        if not _batch_norms(model):
            return "none in the network"
        if self.batchnorm == "interpolate":
            return "statistics interpolated"
        return f"statistics recalibrated on {self.num_batches} training batches"


def measure(
    session: Session,
    model: nn.Module,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    line: Line,
    *,
    what: str,
) -> dict[str, Curve]:
    """The errors on the line between two states of `model`, on training and test images.

    All ranks call it together, and get the same. `what` is shown as it goes on. Raises `UserError`
    where both are the same state, and `Interrupted` after a signal: nothing is kept of a line that
    is not finished.
    """
    if all(torch.equal(value, second[name]) for name, value in first.items()):
        raise UserError(
            f"{what}: both ends are one and the same training: there is no line to measure; train "
            "the second with another seed"
        )
    sets = {"train": _training_images(session, line), "test": session.data.evaluation["test"]}
    recalibrates = line.batchnorm == "recalibrate" and bool(_batch_norms(model))
    flip = session.settings.train.eval_flip
    errors: dict[str, list[float]] = {split: [] for split in sets}
    for point in range(line.points):
        session.display.work(f"{what}: interpolating", point, line.points)
        model.load_state_dict(_between(first, second, point / (line.points - 1)))
        if recalibrates:
            recalibrate(session, model, line.num_batches)
        for split, images in sets.items():
            result = evaluate(model, images, session.engine, flip=flip)
            errors[split].append(1 - result.accuracy)
        if session.signals.poll().stop:
            raise Interrupted(f"at point {point + 1} of {line.points} of the line of {what}")
    session.display.work(f"{what}: interpolating", line.points, line.points)
    return {split: Curve(tuple(found)) for split, found in errors.items()}


def _training_images(session: Session, line: Line) -> EvaluationSet:
    """The training images; where bad ones may be skipped, those that can be decoded."""
    images = session.data.training_images(line.train_images)
    if session.settings.data.on_bad != "skip":
        return images
    parts = session.engine.gather(images.undecodable())
    bad = [image for part in parts for image in part]
    if not bad:
        return images
    session.display.say(f"{len(bad)} training images cannot be decoded, and are not measured")
    return session.data.training_images(line.train_images, without=bad)


def recalibrate(session: Session, model: nn.Module, num_batches: int) -> None:
    """Takes the statistics of batch normalisation anew: means over global training batches.

    Each rank normalises its shares, as in training; the ranks' statistics are averaged. Dropout
    draws the same each time.
    """
    engine = session.engine
    batches = session.first_batches(num_batches, "connectivity", "batchnorm")
    with kept_generators(engine.device), engine.autocast():
        torch.manual_seed(session.seed("connectivity", "dropout", engine.rank))
        update_bn(batches, model)
    for norm in _batch_norms(model):
        for buffer in (norm.running_mean, norm.running_var):
            assert buffer is not None
            buffer.copy_(engine.reduce(buffer) / engine.world_size)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def _between(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """`share` of the second and the rest of the first; counters are the first's."""
    return {
        name: value.lerp(second[name], share) if value.is_floating_point() else value
        for name, value in first.items()
    }


# What is kept of it ----------------------------------------------------------------------


def find_result(level: Folder | str | Path) -> Connectivity | None:
    """What was measured in a level's folder of a run. Raises `RunError` where it is damaged."""
    try:
        return document.read_document(
            Folder(level),
            _RESULT,
            _RESULT_KIND,
            lambda body: Connectivity.from_json(body["connectivity"]),
        )
    except FileNotFoundError:
        return None


def write_result(run: Folder, result: Connectivity) -> None:
    """Keeps a result in the folder of its level."""
    folder = run / f"{result.stage}/{result.name}"
    document.write_document(folder, _RESULT, _RESULT_KIND, {"connectivity": result.to_json()})


def all_results(run: Folder | str | Path) -> list[Connectivity]:
    """Everything that was measured in a run, by stage and level."""
    levels = TicketFolder(Folder(run)).index_folders()
    found = (find_result(level) for level in levels if level.exists(_RESULT))
    return [result for result in found if result is not None]
