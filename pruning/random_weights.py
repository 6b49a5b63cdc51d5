"""Random weights that are a function of a seed.

Layer number `layer` of a network has its signs from stream 0 of the generator (`pruning.philox`),
its magnitudes from stream 1, and its first scores from stream 2. Signs, constant magnitudes and
scores are exact; normal magnitudes go through an inverse error function in float64 and are rounded
to float32, so that another release of torch might give another last bit to a few.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pruning.packing import Shape
from pruning.philox import signs, uniforms

Init = Literal["kaiming_normal", "signed_constant"]
Scaled = Literal["none", "density", "biprop"]
_MAGNITUDES, _SCORES = 1, 2


@dataclass(frozen=True)
class RandomWeights:
    """How a network's weights and first scores are drawn."""

    seed: int
    """from 0 to 2^32 - 1"""
    init: Init = "signed_constant"
    scaled: Scaled = "none"

    def weight(self, shape: Shape, layer: int, density: float) -> Tensor:
        """float32 of the shape `[out, in, ...]`, with the variance 2 / fan_in.

        `kaiming_normal` is normal (He et al. 2015, 1502.01852, equation 10); `signed_constant` has
        the sign of each weight and its standard deviation for a magnitude (Ramanujan et al. 2020,
        1911.13299, section 4.3). With `scaled`, fan_in counts the kept weights alone (`density`),
        so that the variance of a layer's output stays, or the pruned ones (`biprop`, as its code
        does by mistake).
        """
        share = {"none": 1.0, "density": density, "biprop": 1 - density}[self.scaled]
        deviation = math.sqrt(2 / (math.prod(shape[1:]) * share))
        weight = random_signs(shape, seed=self.seed, layer=layer)
        if self.init == "signed_constant":
            return weight.mul_(deviation)
        count = math.prod(shape)
        drawn = torch.from_numpy(uniforms(count, seed=self.seed, layer=layer, stream=_MAGNITUDES))
        magnitude = torch.erfinv(drawn) * (math.sqrt(2) * deviation)
        return weight.mul_(magnitude.float().view(shape))

    def scores(self, shape: Shape, layer: int) -> Tensor:
        """float32, uniform between -1 / sqrt(fan_in) and 1 / sqrt(fan_in)."""
        count, bound = math.prod(shape), 1 / math.sqrt(math.prod(shape[1:]))
        drawn = torch.from_numpy(uniforms(count, seed=self.seed, layer=layer, stream=_SCORES))
        return ((2 * drawn - 1) * bound).float().view(shape)


def random_signs(shape: Shape, *, seed: int, layer: int) -> Tensor:
    """+1 or -1 as float32, in row-major order."""
    positive = signs(math.prod(shape), seed=seed, layer=layer)
    return torch.from_numpy(np.where(positive, np.float32(1), np.float32(-1))).view(shape)
