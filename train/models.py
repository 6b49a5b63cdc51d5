"""Models by name: any timm model, and the CIFAR networks of the papers."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
from torch import nn

from data.errors import UserError, did_you_mean
from train import cifar


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained."""

    name: str = "cifar_resnet20"
    """any timm model, cifar_resnet{6n+2} or cifar_vgg{11,13,16,19}"""
    width: int | None = None
    """channels of the first stage, CIFAR networks only (default: 16 for ResNets, 64 for VGGs)"""
    norm: str | None = None
    """batch or group, CIFAR networks only (default: batch)"""
    drop_rate: float | None = None
    """dropout before the classifier, timm models only"""
    drop_path_rate: float | None = None
    """stochastic depth, timm models only"""

    def __post_init__(self) -> None:
        small = cifar.find_network(self.name) is not None
        if not small and not timm.is_model(self.name):
            known = [*cifar.EXAMPLES, *timm.list_models()]
            raise ValueError(
                f"name = {self.name!r} is no timm model and no CIFAR network"
                f"{did_you_mean(self.name, known)}"
            )
        for option in ("drop_rate", "drop_path_rate") if small else ("width", "norm"):
            if getattr(self, option) is not None:
                raise ValueError(f"{option} is no option of {self.name}")
        if self.norm is not None and self.norm not in cifar.NORMS:
            raise ValueError(f"norm = {self.norm!r}: must be one of {', '.join(cifar.NORMS)}")
        if self.width is not None and self.width < 1:
            raise ValueError(f"width = {self.width}: must be at least 1")


@dataclass(frozen=True)
class ModelSpec:
    """All that rebuilds a network's shape: it stands in every ticket."""

    name: str
    num_classes: int
    in_chans: int
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `ValueError` for what would fetch or unpickle a file: a ticket may be anyone's."""
        if re.search(r"[:/]", self.name):
            raise ValueError(f"model {self.name!r} is not one that is built here")
        for argument in self.arguments:
            if re.search(r"pretrained|checkpoint|cache|_file", argument):
                raise ValueError(f"model argument {argument!r} reads a file")

    @classmethod
    def of(cls, config: ModelConfig, *, num_classes: int, in_chans: int) -> "ModelSpec":
        """The network of `config` for a data set's classes and channels."""
        chosen = {k: v for k, v in asdict(config).items() if k != "name" and v is not None}
        return cls(config.name, num_classes, in_chans, chosen)

    def build(self, seed: int = 0) -> nn.Module:
        """The network with random weights drawn on the CPU from `seed`: equal on every rank.

        torch's generators are left as they were. Raises `UserError` where the network does
        not take its arguments.
        """
        arguments = {"num_classes": self.num_classes, "in_chans": self.in_chans, **self.arguments}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # and no generator of a GPU
            try:
                network = cifar.find_network(self.name)
                model = (
                    timm.create_model(self.name, **arguments)
                    if network is None
                    else network(**arguments)
                )
            except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(f"model {self.name}: {reason}") from error
        return model

    def outline(self) -> nn.Module:
        """The network without memory for its weights (on torch's `meta`). Raises as `build`."""
        with torch.device("meta"):
            return self.build()
