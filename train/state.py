"""All that a training is made of, and what a sparsification method does inside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from data.loader import Loader
from train.optim import load_optimizer_state, optimizer_state
from train.reduction import Reduction
from train.rng import load_rng_state, rng_state


class Sparsity(Protocol):
    """What a lottery method does around every optimizer step; its state is in every checkpoint."""

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool tensor of its shape, `True` where kept; dense ones are absent."""
        ...

    @property
    def density(self) -> float:
        """The fraction of the prunable weights that is kept."""
        ...

    def gradient_masks(self, step: int) -> Mapping[str, Tensor]:
        """Of which entries of the gradients `before_update(step)` makes use: masks as `masks` has
        them; of a parameter that is absent it sees all.

        Ranks need not tell each other the rest, which may then be zero. Another mapping each time
        that something changes; the same on all ranks.
        """
        ...

    def before_update(self, step: int) -> bool:
        """Sees the gradients, summed over ranks and unscaled; `False` vetoes the step.

        After an overflow in fp16 they are not finite, and the optimizer skips this step.
        """
        ...

    def after_update(self, step: int) -> None:
        """Restores the method's invariants on weights and optimizer state."""
        ...

    def facts(self) -> dict[str, float]:
        """What the method wants recorded beside the loss: a penalty, a rate of exploration."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, masks included."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class Network:
    """A model in both its forms: with its own parameter names, and as DDP runs it."""

    module: nn.Module
    wrapped: nn.Module
    reduction: Reduction | None = None
    """of its gradients, on several ranks"""


@dataclass
class TrainState:
    """One training at one step: saved whole, loaded whole (a DCP `Stateful`)."""

    network: Network
    optimizer: Optimizer
    sparsity: Sparsity
    scaler: torch.amp.GradScaler
    loader: Loader
    ema: ModelEmaV3 | None
    rank: int
    device: torch.device
    step: int = 0
    """optimizer steps done since the start of the whole training, vetoed ones included"""

    @property
    def model(self) -> nn.Module:
        """The network itself, without the wrappers of DDP and compilation."""
        return self.network.module

    @property
    def evaluated(self) -> nn.Module:
        """The model that is measured: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values in nested dicts. What differs by rank stands under `ranks`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "ema": {} if self.ema is None else self.ema.module.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sparsity": self.sparsity.state_dict(),
            "loader": self.loader.state_dict(),
            "progress": {"step": self.step},
            "ranks": {str(self.rank): {"rng": rng_state(self.device)}},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts everything back. A rank that the saved run did not have keeps its fresh RNG."""
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.sparsity.load_state_dict(state["sparsity"])
        self.loader.load_state_dict(state["loader"])
        self.step = int(state["progress"]["step"])
        own = state.get("ranks", {}).get(str(self.rank))
        if own is not None:
            load_rng_state(own["rng"], self.device)
