"""Data sets that fit in memory: scikit-learn's digits, CIFAR, and MNIST-like idx files."""

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.augment import Augmentation, Normalisation
from data.errors import UserError
from data.order import random_permutation

_SPLIT_SEED = 1797  # fixed: every run of every seed has the same digits split


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


def idx(root: str) -> ImageArrays:
    """MNIST-like idx files, plain or gzipped: MNIST, Fashion-MNIST, KMNIST, and their like.

    `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same of `t10k`, in `root` or in
    `root/raw`. The format: two zero bytes, a type (8: unsigned byte), the number of dimensions,
    their sizes as big-endian 32-bit integers, then the values.
    """
    folder = Path(root).expanduser()
    train, test = (
        Split(
            _read_idx(folder, f"{part}-images", 3)[:, None],
            _read_idx(folder, f"{part}-labels", 1).astype(np.int64),
        )
        for part in ("train", "t10k")
    )
    for split in (train, test):
        if len(split.images) != len(split.labels):
            raise UserError(
                f"data.root = {str(folder)!r}: {len(split.images)} images and "
                f"{len(split.labels)} labels"
            )
        if len(split.images) == 0:
            raise UserError(f"data.root = {str(folder)!r}: there are no images")
    if test.labels.max() > train.labels.max():
        raise UserError(
            f"data.root = {str(folder)!r}: a test label is {test.labels.max()}, and the largest "
            f"in training {train.labels.max()}"
        )
    pixels = train.images / 255
    return ImageArrays(
        train=train,
        validation=None,
        test=test,
        normalisation=Normalisation((float(pixels.mean()),), (float(pixels.std()) or 1.0,)),
        augmentation=Augmentation(max_shift=2),
        classes=tuple(str(label) for label in range(int(train.labels.max()) + 1)),
    )


def _read_idx(folder: Path, name: str, num_dims: int) -> NDArray[np.uint8]:
    names = [f"{name}{dot}idx{num_dims}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    paths = [place / one for place in (folder, folder / "raw") for one in names]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"data.root = {str(folder)!r}: there is no {names[0]}, nor {names[1]}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from None
    start = 4 + 4 * num_dims
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if content[:4] != bytes((0, 0, 8, num_dims)) or len(content) != start + math.prod(shape):
        raise UserError(
            f"{path}: is no whole idx file of {num_dims}-dimensional unsigned bytes; download it "
            "again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


READERS: dict[str, Callable[[str], ImageArrays]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "idx": idx,
}
