"""The multilayer perceptron of the papers: hidden layers of one width, and a head."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from train.activations import ACTIVATIONS
from train.cifar import initialise, one_stage


class Unit(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, in_features: int, features: int, *, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, features)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """`x: [N, width]` -> the same shape."""
        activated: Tensor = self.act(self.linear(x))
        return activated


class Mlp(nn.Module):
    """`[N, in_chans, H, W]` to `[N, num_classes]`: the pixels, hidden units of `width`, the head.

    It reads `side` x `side` pixels, those of MNIST by default; larger images are averaged to them.
    Raises `ValueError` for smaller ones.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_chans: int = 1,
        side: int = 28,
        width: int = 128,
        activation: str = "relu",
        blocks: Sequence[int] = (1,),
    ) -> None:
        super().__init__()
        (count,) = one_stage(blocks)
        sizes = [in_chans * side**2, *[width] * count]
        units = [Unit(before, after, activation=activation) for before, after in pairwise(sizes)]
        self.side = side
        # where timm's models tell it
        self.default_cfg = self.pretrained_cfg = {"input_size": (in_chans, side, side)}
        self.hidden = nn.Sequential(*units)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """`x: [N, C, H, W]` -> logits `[N, num_classes]`. Raises `ValueError` for images that are
        too small."""
        height, width = x.shape[-2:]
        if min(height, width) < self.side:
            raise ValueError(
                f"side = {self.side} is more than their {height}x{width} pixels: set model.side = "
                f"{min(height, width)}"
            )
        if (height, width) != (self.side, self.side):
            x = F.adaptive_avg_pool2d(x, self.side)
        scores: Tensor = self.fc(self.hidden(x.flatten(1)))
        return scores
