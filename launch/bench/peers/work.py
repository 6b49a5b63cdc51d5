"""What is trained, taken from a shipped configuration: the same for ours and for the peers."""

import argparse
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

import launch
from data.arrays import READERS, ImageArrays
from launch.config import RunConfig, parse_document
from train.duration import Duration
from train.models import ModelSpec
from train.optim import OptimizerConfig
from train.schedule import Schedule, build_schedule

OPTIMIZERS = ("momentum", "adam")
Number = TypeVar("Number", int, float)


def at_least(kind: type[Number], least: float, most: float = math.inf) -> Callable[[str], Number]:
    """Reads an option of a script: a number from `least` to `most`, or one line that says so."""

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind(least) - 1
        if not least <= value <= most:
            upwards = "or more" if most == math.inf else f"to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r}: must be {least:g} {upwards}")
        return value

    return read


def shipped(name: str, stage: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A shipped configuration of digits with one of its stages, which has no controls."""
    path = Path(launch.__file__).parent / "configs" / f"{name}.toml"
    document = tomllib.loads(path.read_text())
    document["stages"] = [
        {key: value for key, value in one.items() if key != "controls"}
        for one in document["stages"]
        if one["name"] == stage
    ]
    return parse_document(document, str(path), overrides)


@dataclass(frozen=True)
class Training:
    """One training from step 0 to its end, of images that are not augmented."""

    images: ImageArrays
    model: ModelSpec
    batch_size: int
    num_steps: int
    schedule: Schedule
    """step -> factor on the base rate"""
    optimizer: OptimizerConfig
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> "Training":
        """What the first stage of a configuration trains."""
        settings = config.stages[0].settings
        images = READERS[settings.data.kind](settings.data.place)
        steps_per_epoch = len(images.train.labels) // settings.data.batch_size
        num_steps = Duration.parse(settings.train.total).steps(steps_per_epoch)
        schedule = build_schedule(
            settings.schedule, steps_per_epoch=steps_per_epoch, total_steps=num_steps
        )
        num_classes, in_chans = len(images.classes), images.train.images.shape[1]
        return cls(
            images,
            ModelSpec.of(settings.model, num_classes=num_classes, in_chans=in_chans),
            settings.data.batch_size,
            num_steps,
            schedule,
            settings.optimizer,
            settings.seed,
        )

    @property
    def steps_per_epoch(self) -> int:
        """The incomplete batch at the end of an epoch is left out."""
        return len(self.images.train.labels) // self.batch_size

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """PyTorch's own, over the parameters that are trained."""
        config = self.optimizer
        trained = [p for p in model.parameters() if p.requires_grad]
        if config.name == "adam":
            return torch.optim.Adam(trained, config.lr, weight_decay=config.weight_decay)
        assert config.name == "momentum", f"a peer has {OPTIMIZERS} alone"
        return torch.optim.SGD(
            trained, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
