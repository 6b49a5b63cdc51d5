"""The data sets: digits (ships with scikit-learn), CIFAR-10 and CIFAR-100 (through torchvision).

`open_data` is the one place that knows which loader serves which source.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment import Augmentation, Augmenter, Normalisation
from data.errors import UserError, did_you_mean
from data.loader import EvaluationSet, Loader, MemoryEvaluationSet, MemoryLoader
from data.order import random_permutation

_SPLIT_SEED = 1797  # fixed: every run of every seed has the same digits split


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how large a batch is."""

    source: str = "digits"
    """digits, cifar10 or cifar100"""
    root: str = "~/.cache/tombola"
    """folder of the data set (digits needs none)"""
    batch_size: int = 128
    """images per optimizer step over all ranks: the same on 1 GPU and on 64"""
    eval_batch_size: int = 1024
    """images per evaluation batch and rank"""
    augment: bool = True
    """random shifts, and flips where they make sense, of the training images"""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            known = ", ".join(SOURCES)
            near = did_you_mean(self.source, SOURCES)
            raise ValueError(f"source = {self.source!r} is not known{near} (known: {known})")
        for name in ("batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Split:
    """`images: [N, C, H, W] uint8`, `labels: [N] int64`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class ImageArrays:
    """A data set that fits in memory, with what is to be known about its pixels."""

    train: Split
    validation: Split | None
    test: Split
    normalisation: Normalisation
    augmentation: Augmentation
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """An opened data set: `loader(seed)` for training, `evaluation[split]` for measuring."""

    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    steps_per_epoch: int
    loader: Callable[[int], Loader]
    evaluation: dict[str, EvaluationSet]


def digits(root: str) -> ImageArrays:
    """scikit-learn's 1,797 real 8x8 digits: 1,258 train, 180 validation, 359 test, stratified."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    test, validation, train = _stratified(labels, (0.2, 0.1))
    pixels = images[train] / 255
    return ImageArrays(
        train=Split(images[train], labels[train]),
        validation=Split(images[validation], labels[validation]),
        test=Split(images[test], labels[test]),
        normalisation=Normalisation((float(pixels.mean()),), (float(pixels.std()),)),
        augmentation=Augmentation(max_shift=1),
        classes=tuple(str(name) for name in bunch.target_names),
    )


def _stratified(labels: NDArray[np.int64], fractions: tuple[float, ...]) -> list[NDArray[np.int64]]:
    """Cuts the samples into `len(fractions) + 1` parts, each class in the same proportions."""
    shuffled = random_permutation(_SPLIT_SEED, len(labels))
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(len(fractions) + 1)]
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        cuts = np.round(np.cumsum(fractions) * len(members)).astype(np.int64)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def _cifar(root: str, *, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageArrays:
    from torchvision import datasets

    kind = getattr(datasets, name)
    folder = Path(root).expanduser()
    try:
        parts = [kind(folder, train=train) for train in (True, False)]
    except RuntimeError:
        download = (
            f"import torchvision; torchvision.datasets.{name}({str(folder)!r}, download=True)"
        )
        raise UserError(
            f"data.root = {str(folder)!r} holds no complete {name}; set data.root to its folder, "
            f'or download it: python -c "{download}"'
        ) from None
    train, test = (
        Split(
            np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)),
            np.asarray(part.targets, dtype=np.int64),
        )
        for part in parts
    )
    return ImageArrays(
        train=train,
        validation=None,
        test=test,
        normalisation=Normalisation(mean, std),
        augmentation=Augmentation(max_shift=4, flip=True),
        classes=tuple(parts[0].classes),
    )


def cifar10(root: str) -> ImageArrays:
    """CIFAR-10 in its python batches, as torchvision reads them: 50,000 train, 10,000 test."""
    return _cifar(root, name="CIFAR10", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def cifar100(root: str) -> ImageArrays:
    """CIFAR-100, fine labels: 50,000 train, 10,000 test."""
    return _cifar(
        root, name="CIFAR100", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    )


IN_MEMORY: dict[str, Callable[[str], ImageArrays]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
}
ON_DISK = ("imagenet",)
SOURCES = (*IN_MEMORY, *ON_DISK)


def open_data(config: DataConfig, *, device: torch.device, rank: int, world_size: int) -> Data:
    """Opens the data set of `config` for one rank.

    Raises `UserError` where the data are missing, naming the folder and how to get them.
    """
    if config.source not in IN_MEMORY:
        raise UserError(
            f"data.source = {config.source!r}: this version reads {', '.join(IN_MEMORY)}; the "
            "loader for image files on disk is not part of it"
        )
    arrays = IN_MEMORY[config.source](config.root)

    def resident(split: Split) -> tuple[Tensor, Tensor]:
        images = arrays.normalisation(torch.from_numpy(split.images).to(device))
        return images, torch.from_numpy(split.labels).to(device)

    images, labels = resident(arrays.train)
    augmenter = Augmenter(images, arrays.augmentation if config.augment else Augmentation())

    def loader(seed: int) -> MemoryLoader:
        return MemoryLoader(
            augmenter,
            labels,
            batch_size=config.batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    held_out = {"validation": arrays.validation, "test": arrays.test}
    evaluation: dict[str, EvaluationSet] = {
        name: MemoryEvaluationSet(
            *resident(split), batch_size=config.eval_batch_size, rank=rank, world_size=world_size
        )
        for name, split in held_out.items()
        if split is not None
    }
    return Data(
        image_shape=(int(images.shape[1]), int(images.shape[2]), int(images.shape[3])),
        classes=arrays.classes,
        steps_per_epoch=loader(0).steps_per_epoch,
        loader=loader,
        evaluation=evaluation,
    )
