"""MNIST-like idx files: read in every spelling, and refused when they are not whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import Arrays, write
from torchvision import datasets

from data.arrays import idx
from data.config import DataConfig
from data.errors import UserError
from data.sources import Placement, open_data

NAMES = ("train-images", "train-labels", "t10k-images", "t10k-labels")


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Seven training and three test images of 5x4, of four classes."""
    rng = np.random.default_rng(0)
    return {
        "train-images": rng.integers(0, 256, (7, 5, 4), dtype=np.uint8),
        "train-labels": np.array([2, 0, 1, 3, 3, 0, 1], np.uint8),
        "t10k-images": rng.integers(0, 256, (3, 5, 4), dtype=np.uint8),
        "t10k-labels": np.array([1, 3, 0], np.uint8),
    }


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("subfolder", ["", "raw"])
def test_idx_files_are_read_in_every_spelling(
    arrays: Arrays, tmp_path: Path, dot: str, packed: bool, subfolder: str
) -> None:
    """Images gain a channel; labels are int64; the classes are numbered."""
    write(tmp_path / subfolder, arrays, dot=dot, packed=packed)
    found = idx(str(tmp_path))
    for split, part in ((found.train, "train"), (found.test, "t10k")):
        assert np.array_equal(split.images, arrays[f"{part}-images"][:, None])
        assert np.array_equal(split.labels, arrays[f"{part}-labels"])
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)
    assert found.validation is None
    assert found.classes == ("0", "1", "2", "3")


def test_torchvision_reads_the_same(arrays: Arrays, tmp_path: Path) -> None:
    """Of the same files, in its own folder."""
    write(tmp_path / "MNIST/raw", arrays)
    theirs = [datasets.MNIST(str(tmp_path), train=train) for train in (True, False)]
    found = idx(str(tmp_path / "MNIST"))
    for split, other in zip((found.train, found.test), theirs, strict=True):
        assert torch.equal(torch.from_numpy(split.images[:, 0]), other.data)
        assert torch.equal(torch.from_numpy(split.labels), other.targets)


def test_idx_images_open_as_batches_normalised_by_the_training_images(
    arrays: Arrays, tmp_path: Path
) -> None:
    """Mean 0 and standard deviation 1 over the training pixels."""
    write(tmp_path, arrays)
    config = DataConfig(f"idx:{tmp_path}", batch_size=7, augment=False)
    data = open_data(config, Placement(torch.device("cpu")))
    assert (data.image_shape, data.steps_per_epoch) == ((1, 5, 4), 1)
    images = next(iter(data.loader(0))).images
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert data.evaluation["test"].num_samples == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_idx_file_is_named(arrays: Arrays, tmp_path: Path, name: str) -> None:
    """With the folder, and plain or packed."""
    write(tmp_path, arrays)
    (path,) = tmp_path.glob(f"{name}*")
    path.unlink()
    with pytest.raises(UserError, match=rf"'{tmp_path}': there is no {path.name}, nor {path.name}"):
        idx(str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_file_that_is_cut_off_anywhere_is_refused(
    arrays: Arrays, tmp_path: Path, name: str, packed: bool
) -> None:
    """In its header or its values, or as a download; by its path."""
    write(tmp_path, arrays, packed=packed)
    (path,) = tmp_path.glob(f"{name}*")
    whole = path.read_bytes()
    for length in [*range(min(30, len(whole) - 1)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{path}: (is no whole idx|cannot be unpacked)"):
            idx(str(tmp_path))


def test_an_idx_file_that_is_too_long_is_refused(arrays: Arrays, tmp_path: Path) -> None:
    """Its header belongs to other values."""
    write(tmp_path, arrays)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes() + b"\x01")
    with pytest.raises(UserError, match=rf"{path}: is no whole idx file of 1-dimensional"):
        idx(str(tmp_path))


@pytest.mark.parametrize(
    "magic", [b"\0\0\x08\x01", b"\0\0\x09\x03", b"\0\0\x0d\x03", b"\x1f\x8b\x08\x03", b"<htm"]
)
def test_another_type_or_number_of_dimensions_is_refused(
    arrays: Arrays, tmp_path: Path, magic: bytes
) -> None:
    """Labels for images, signed bytes, floats, a packed file without its ending, a web page."""
    write(tmp_path, arrays)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(magic + path.read_bytes()[4:])
    with pytest.raises(UserError, match=rf"{path}: is no whole idx file of 3-dimensional"):
        idx(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("train-labels", "7 images and 6 labels"), ("t10k-images", "2 images and 3 labels")],
)
def test_images_and_labels_of_different_numbers_are_refused(
    arrays: Arrays, tmp_path: Path, name: str, numbers: str
) -> None:
    """In either split, with both numbers."""
    write(tmp_path, {**arrays, name: arrays[name][:-1]})
    with pytest.raises(UserError, match=rf"data\.root = '{tmp_path}': {numbers}"):
        idx(str(tmp_path))


def test_a_test_label_that_training_does_not_know_is_refused(
    arrays: Arrays, tmp_path: Path
) -> None:
    """A network of four classes cannot guess the fifth."""
    write(tmp_path, {**arrays, "t10k-labels": np.array([1, 4, 0], np.uint8)})
    with pytest.raises(UserError, match="label"):
        idx(str(tmp_path))


def test_idx_files_without_images_are_refused(arrays: Arrays, tmp_path: Path) -> None:
    """A user's error, and no traceback of numpy's."""
    write(tmp_path, {name: array[:0] for name, array in arrays.items()})
    with pytest.raises(UserError):
        idx(str(tmp_path))


def test_images_that_are_all_the_same_are_read(arrays: Arrays, tmp_path: Path) -> None:
    """Without a division by a standard deviation of zero."""
    write(tmp_path, {**arrays, "train-images": np.full((7, 5, 4), 9, np.uint8)})
    found = idx(str(tmp_path))
    images = found.normalisation(torch.from_numpy(found.train.images))
    assert images.abs().max().item() == pytest.approx(0, abs=1e-6)
