"""How dual tickets are made: the configuration, and what is known of it before anything is trained.

`pruning.dual_program` has the program.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from data.errors import UserError
from pruning.dual import Curve, Cycles, Pick, Ramp
from pruning.masks import prunable
from pruning.options import check_controls, check_densities, densest_first
from pruning.sources import Outlook, Promise
from train.duration import Duration, check_durations, check_lengths
from train.models import ModelSpec
from train.optim import OptimizerConfig
from train.session import Session
from train.settings import Settings

Control = Literal["random", "budget"]
DUAL_DEFAULTS = {"optimizer.weight_decay": "5e-4"}
"""the authors' on CIFAR"""


@dataclass(frozen=True)
class TransformConfig:
    """The transformation before the removal: a training of its own, of the dense network.

    Its lengths are in its own steps; an epoch and a percent of the training are as many images as
    in the training, whatever the two batch sizes are.
    """

    cycles: int = 1
    """in how many steps the weights that will go become more; in each lambda begins anew"""
    ramp: str | None = None
    """time in which lambda grows, in each cycle; by default 32% in one cycle, else 6.4%"""
    stabilise: str | None = None
    """time at the last lambda, in each cycle; by default 25.6% in one cycle, else 6.4%"""
    limit: float = 1.0
    """lambda grows until it is at least this"""
    increment: float | None = None
    """by how much at a time, before the power of `schedule`; by default as the ramp is long"""
    interval: str | None = None
    """time between two increments; by default 5it in one cycle, else 1it"""
    schedule: Curve = "x"
    """lambda is c, c^2 or c^3 of what grows evenly"""
    lr: float = 1e-3
    """constant learning rate"""
    weight_decay: float = 5e-4
    """of the transformation"""
    batch_size: int | None = None
    """of its global batches; by default data.batch_size"""

    def __post_init__(self) -> None:
        check_lengths(self, "ramp", "interval")
        check_durations(self, "stabilise")
        for name in ("limit", "increment", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: must be above 0 and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay = {self.weight_decay}: must not be negative")
        for name in ("cycles", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        ramp, interval = (Duration.parse(text) for text in (self.ramp_length, self.interval_length))
        if ramp.unit == interval.unit == "it":
            self._ramp(ramp.steps(1), interval.steps(1))  # what needs no data to be known

    @property
    def ramp_length(self) -> str:
        """The ramp of a cycle as a duration; of the paper's 200 epochs 64, or 12.8 a cycle."""
        return self.ramp or ("32%" if self.cycles == 1 else "6.4%")

    @property
    def stabilise_length(self) -> str:
        """The rest of a cycle as a duration."""
        return self.stabilise or ("25.6%" if self.cycles == 1 else "6.4%")

    @property
    def interval_length(self) -> str:
        """The time between two increments as a duration."""
        return self.interval or ("5it" if self.cycles == 1 else "1it")

    def optimizer(self, training: OptimizerConfig) -> OptimizerConfig:
        """The training's, with the transformation's own rate and decay."""
        return replace(training, lr=self.lr, weight_decay=self.weight_decay)

    def course(self, session: Session, where: str) -> Cycles:
        """Its cycles in steps. Raises `UserError`, beginning with `where`, if they cannot be."""
        lengths = {
            "ramp": self.ramp_length,
            "stabilise": self.stabilise_length,
            "interval": self.interval_length,
        }
        steps = {
            name: session.steps(text, batch_size=self.batch_size) for name, text in lengths.items()
        }
        for name in ("ramp", "interval"):
            if steps[name] < 1:
                raise UserError(f"{where}.{name} = {lengths[name]!r}: is less than one step")
        try:
            ramp = self._ramp(steps["ramp"], steps["interval"])
        except ValueError as error:
            raise UserError(f"{where}.{error}") from None
        return Cycles(ramp, steps["ramp"] + steps["stabilise"], self.cycles)

    def _ramp(self, steps: int, interval: int) -> Ramp:
        return Ramp.within(
            steps,
            interval=interval,
            limit=self.limit,
            increment=self.increment,
            curve=self.schedule,
        )


@dataclass(frozen=True)
class DualConfig:
    """Dual tickets: subnetworks drawn at random, for which the dense network is transformed."""

    density: tuple[float, ...] = (0.1,)
    """the fraction kept of each layer; several are made one after the other, the largest first"""
    pick: Pick = "random"
    """what goes: random, or, as an ablation, min: the smallest initial weights"""
    exclude: tuple[str, ...] = ()
    """patterns of the names of layers that stay dense, such as fc"""
    transform: TransformConfig = field(default_factory=TransformConfig)
    controls: tuple[Control, ...] = ()
    """what to train beside each ticket, with its masks and the initial weights: random (as long as
    the ticket after its transformation) and budget (as many steps more as that took)"""

    def __post_init__(self) -> None:
        check_densities(self.density)
        check_controls(self.controls)

    @property
    def densities(self) -> tuple[float, ...]:
        """From the densest on: level 0 is that."""
        return densest_first(self.density)


def foresee_dual(stage: str, config: DualConfig, settings: Settings, outlook: Outlook) -> Promise:
    """What the stage will have made. Raises `UserError` for what is known to fail."""
    outline = ModelSpec.of(settings.model, num_classes=10, in_chans=3).outline()
    try:
        weights = prunable(outline, config.exclude)
    except UserError as error:
        raise UserError(f"stages.{stage}.{error}") from None
    for name, weight in weights.items():
        if weight.numel() == 1 and min(config.density) < 1:
            layer = name.rpartition(".")[0]
            raise UserError(
                f"stages.{stage}: {settings.model.name}: layer {layer} has 1 weight, of which none "
                f"can go: leave it dense with exclude = {layer!r}"
            )
    return Promise(dict.fromkeys(range(len(config.density)), settings.model))
