"""A `TrainState` around any model: what the engine's verbs need, and no more."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.augment import Augmentation, Augmenter
from data.loader import MemoryLoader
from train.engine import Engine
from train.state import Network, Sparsity, TrainState


class Dense:
    """No sparsity: every step is taken, nothing is masked."""

    masks: Mapping[str, Tensor] = {}
    density = 1.0

    def gradient_masks(self, step: int) -> Mapping[str, Tensor]:
        return {}

    def before_update(self, step: int) -> bool:
        return True

    def after_update(self, step: int) -> None:
        pass

    def facts(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def state_of(
    engine: Engine,
    model: nn.Module | Network,
    optimizer: Optimizer,
    sparsity: Sparsity | None = None,
    *,
    batch_size: int = 1,
) -> TrainState:
    """A fresh state at step 0, whose loader says that the global batch is `batch_size`."""
    network = model if isinstance(model, Network) else Network(model, model)
    nothing = torch.zeros(batch_size, 1, 1, 1)
    return TrainState(
        network=network,
        optimizer=optimizer,
        sparsity=sparsity or Dense(),
        scaler=engine.make_scaler(),
        loader=MemoryLoader(
            Augmenter(nothing, Augmentation()),
            torch.zeros(batch_size, dtype=torch.int64),
            batch_size=batch_size,
            seed=0,
        ),
        ema=None,
        rank=engine.rank,
        device=engine.device,
    )
