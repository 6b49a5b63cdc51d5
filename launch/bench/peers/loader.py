"""A `DataLoader` over PIL images: what open_lth, biprop and most training scripts read with.

Each sample is made an image, a tensor, and normalised by itself, by torchvision's transforms; the
loader joins them to batches. Written by us in that design, which is torchvision's documentation's.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from data.arrays import Split
from data.augment import Normalisation


class PilImages(Dataset[tuple[Tensor, int]]):
    """A split, image by image: `[C, H, W] float32`, normalised, and a label."""

    def __init__(self, split: Split, normalisation: Normalisation) -> None:
        self._images: NDArray[np.uint8] = split.images.transpose(0, 2, 3, 1)  # as PIL has them
        self._labels = split.labels
        steps = [
            transforms.ToTensor(),
            transforms.Normalize(normalisation.mean, normalisation.std),
        ]
        self._view = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self._images[index]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return self._view(image), int(self._labels[index])


def pil_loader(
    split: Split,
    normalisation: Normalisation,
    *,
    batch_size: int,
    shuffled_by: torch.Generator | None = None,
    num_workers: int = 0,
) -> DataLoader[tuple[Tensor, int]]:
    """Batches of a split: each epoch in another order, or, without a generator, all in order.

    An incomplete batch is left out of a training, as ours does.
    """
    images = PilImages(split, normalisation)
    return DataLoader(
        images,
        batch_size,
        sampler=None if shuffled_by is None else RandomSampler(images, generator=shuffled_by),
        drop_last=shuffled_by is not None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
