"""Batched augmentation on the device that holds the images.

Every draw comes from `data.order.sample_uniforms`: what happens to a sample depends on
(seed, epoch, sample) and not on the batch, the rank or the step at which a run was resumed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.order import sample_uniforms


def placed(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on a device, without waiting for what the device was given before."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # what is not pinned is copied in step with the device
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Augmentation:
    """A random shift (zero padding, then a crop), and a flip where it makes sense."""

    max_shift: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, of pixel values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """`[N, C, H, W] uint8` to normalised `float32`."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() / 255 - mean) / std


@dataclass(frozen=True)
class Preprocessing:
    """How images are made ready for a network when it is measured; so shall whoever runs it."""

    image_shape: tuple[int, int, int]
    """channels, height, width; of image files, the central crop"""
    mean: tuple[float, ...]
    """per channel, of pixel values in [0, 1]"""
    std: tuple[float, ...]
    resize: int | None = None
    """image files: the shorter side before the crop"""


class Augmenter:
    """Holds a training set ready for random crops: `images: [N, C, H, W] float32`, normalised."""

    def __init__(self, images: Tensor, augmentation: Augmentation) -> None:
        self.augmentation = augmentation
        self.size = images.shape[-2:]
        pad = augmentation.max_shift
        self._padded = F.pad(images, (pad, pad, pad, pad)) if pad else images

    def __call__(self, samples: NDArray[np.int64], *, seed: int, epoch: int) -> Tensor:
        """The augmented images of `samples`: `[len(samples), C, H, W]`."""
        device = self._padded.device
        images = self._padded.index_select(0, placed(samples, device))
        if self.augmentation == Augmentation():
            return images
        draws = sample_uniforms(seed, epoch, samples, 3)
        if self.augmentation.max_shift:
            images = self._crop(images, draws[:, 0], draws[:, 1])
        if self.augmentation.flip:
            flip = placed(draws[:, 2] < 0.5, device).view(-1, 1, 1, 1)
            images = torch.where(flip, images.flip(3), images)
        return images

    def _crop(self, padded: Tensor, top: NDArray[np.float64], left: NDArray[np.float64]) -> Tensor:
        num_offsets = 2 * self.augmentation.max_shift + 1
        height, width = self.size
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, oy, ox, H, W], a view
        rows = placed((top * num_offsets).astype(np.int64), padded.device)
        columns = placed((left * num_offsets).astype(np.int64), padded.device)
        each = torch.arange(len(padded), device=padded.device)
        return windows[each, :, rows, columns]
