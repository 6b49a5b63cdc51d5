"""A `TrainState` around any model: what the engine's verbs need, and no more."""

import torch
from torch import nn
from torch.optim import Optimizer

from data.augment import Augmentation, Augmenter
from data.loader import MemoryLoader
from train.engine import Engine
from train.state import Dense, Network, Sparsity, TrainState


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
