"""Learning-rate schedules as pure functions of the step: a resume or a rewind is just a number."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from train.duration import Duration, check_durations

Name = Literal["constant", "step", "cosine", "linear"]
Schedule = Callable[[int], float]
"""step -> factor on the base learning rate"""


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes over the training."""

    name: Name = "step"
    """constant, step (falls at milestones), cosine or linear (to `final`)"""
    milestones: tuple[str, ...] = ()
    """step: where the rate is multiplied by `gamma`"""
    gamma: float = 0.1
    """step: the factor at each milestone"""
    warmup: str = "0it"
    """linear rise from 0 to the base rate over this long"""
    final: float = 0.0
    """cosine, linear: the factor reached at the end"""

    def __post_init__(self) -> None:
        check_durations(self, "milestones", "warmup")
        if self.name not in get_args(Name):
            raise ValueError(f"name = {self.name!r}: must be one of {', '.join(get_args(Name))}")
        if self.milestones and self.name != "step":
            raise ValueError(f"milestones = {self.milestones}: only the 'step' schedule has them")
        for name in ("gamma", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be between 0 and 1")


def build_schedule(config: ScheduleConfig, *, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The schedule of a training of `total_steps` steps.

    The warm-up follows Goyal et al. 2017 (1706.02677): the rate rises linearly, and what comes
    after keeps the positions that it has without a warm-up.
    """

    def steps(text: str) -> int:
        return Duration.parse(text).steps(steps_per_epoch, total_steps)

    warmup = steps(config.warmup)
    milestones = sorted(steps(text) for text in config.milestones)

    def decay(step: int) -> float:
        done = min(step / total_steps, 1.0)
        if config.name == "step":
            return float(config.gamma ** sum(step >= milestone for milestone in milestones))
        if config.name == "cosine":
            return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2
        if config.name == "linear":
            return config.final + (1 - config.final) * (1 - done)
        return 1.0

    def factor(step: int) -> float:
        return decay(step) * min(1.0, (step + 1) / warmup if warmup else 1.0)

    return factor


def stretched(schedule: Schedule, total: int, stop: int) -> Schedule:
    """A schedule of `total` steps over `stop` steps, more or fewer."""
    return lambda step: schedule(step * total // stop)


def constant(factor: float) -> Schedule:
    """The same factor at every step."""
    return lambda step: factor
