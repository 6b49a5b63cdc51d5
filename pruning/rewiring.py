"""When masks change in training, by how much, and what a layer then drops and grows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.order import random_choice
from pruning.select import select_largest

# Schedules ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewiring:
    """When SET and RigL move weights, and which share of them."""

    interval: int
    """dT: steps from one change to the next"""
    fraction: float
    """SET's zeta, RigL's alpha"""
    until: int
    """T_end: from this step on nothing changes any more"""

    def is_due(self, step: int) -> bool:
        """Whether masks change after so many steps."""
        return 0 < step < self.until and step % self.interval == 0

    def cosine(self, step: int) -> float:
        """f(t) = alpha / 2 (1 + cos(pi t / T_end)) (1911.11134, section 3)."""
        return self.fraction / 2 * (1 + math.cos(math.pi * step / self.until))


@dataclass(frozen=True)
class Ramp:
    """How gradual magnitude pruning comes to its density."""

    interval: int
    """steps from one pruning to the next"""
    start: int
    """of the first pruning"""
    stop: int
    """of the last one, after `start`"""
    final: Mapping[str, int] | int
    """weights of each layer that are kept in the end; one number: over all layers together"""
    initial: float = 1.0
    """the density at `start`"""

    def is_due(self, step: int) -> bool:
        """Whether anything is pruned after so many steps: every interval, and at the end."""
        on_time = (step - self.start) % self.interval == 0
        return self.start <= step <= self.stop and (on_time or step == self.stop)

    def count(self, step: int, final: int, size: int) -> int:
        """How many of `size` weights are kept after so many steps, rounded to the nearest.

        Zhu and Gupta 2017 (1710.01878, equation 1) in densities: d_f + (d_i - d_f) (1 - x)^3, where
        x is the share of the ramp that is done. Never fewer than `final`.
        """
        if step >= self.stop:
            return final
        done = (step - self.start) / (self.stop - self.start)
        last = final / size
        density = last + (max(self.initial, last) - last) * (1 - done) ** 3
        return math.floor(density * size + 0.5)


# What is dropped and grown --------------------------------------------------------------------


def drop_smallest(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """`mask` less its `count` smallest absolute weights: `bool` of its shape, as all here.

    Of equal ones the later by flat index go first. Raises `ValueError` for a NaN.
    """
    return _largest(weight, int(mask.sum()) - count, mask)


def grow_largest(gradient: Tensor, kept: Tensor, count: int) -> Tensor:
    """`kept` and the `count` largest absolute gradients elsewhere. Raises as `drop_smallest`."""
    return kept | _largest(gradient, count, ~kept)


def grow_random(kept: Tensor, count: int, seed: int) -> Tensor:
    """`kept` and `count` others, uniformly at random: equal on every machine."""
    free = (~kept).flatten().nonzero().flatten()
    chosen = torch.from_numpy(random_choice(seed, len(free), count)).to(free.device)
    grown = kept.flatten().clone()
    grown[free[chosen]] = True
    return grown.view(kept.shape)


def _largest(values: Tensor, count: int, within: Tensor) -> Tensor:
    scores = values.detach().abs().float()
    return select_largest({"layer": scores}, count, {"layer": within})["layer"]
