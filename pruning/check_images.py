"""The images whose logits tell whether a network was read as it was written."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import RunError
from pruning.packing import Shape
from pruning.philox import words

NUM_IMAGES = 2
_STREAM = 3
_MOST_VALUES = 1 << 22
"""of an image: what anyone's file may have this machine compute is limited"""


def check_images(image_shape: Shape) -> Tensor:
    """`[2, C, H, W]` float32, uniform in [-1, 1): multiples of 2^-23, equal on every machine."""
    shape = (NUM_IMAGES, *image_shape)
    drawn = words(math.prod(shape), seed=0, layer=0, stream=_STREAM) >> 8
    return torch.from_numpy(drawn.astype(np.float32) / (1 << 23) - 1).view(shape)


@torch.no_grad()
def check_logits(model: nn.Module, image_shape: Shape) -> Tensor:
    """The logits of `check_images`, computed in float64 and rounded to float32.

    In float64, so that the order of sums, which is another on other machines, hardly ever shows.
    `model` stays in float64. Raises `RunError` where it does not take such images.
    """
    images = check_images(image_shape).double()
    try:
        logits: Tensor = model.double().eval()(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        shown, problem = "x".join(map(str, image_shape)), str(error).partition("\n")[0]
        raise RunError(f"the network does not take images of {shown}: {problem:.200}") from error
    return logits.float()


def require_images(image_shape: Shape, *, in_chans: int) -> None:
    """Raises `ValueError` unless these are the channels, height and width of a sensible image."""
    if len(image_shape) != 3 or image_shape[0] != in_chans or 0 in image_shape:
        shown = f"{list(image_shape)!r:.60}"
        raise ValueError(f"images of shape {shown}: not of {in_chans} channels, height and width")
    if math.prod(image_shape) > _MOST_VALUES:
        shown = "x".join(map(str, image_shape))
        raise ValueError(f"images of {shown}: larger than {_MOST_VALUES:,} values")
