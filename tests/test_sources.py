"""The data sets as arrays, and the in-memory loader over them."""

import hashlib
import io
import itertools
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from data.arrays import ImageArrays, cifar10, cifar100, digits
from data.augment import Augmentation, Augmenter, Normalisation
from data.config import DataConfig
from data.errors import UserError
from data.loader import Batch, MemoryEvaluationSet, MemoryLoader
from data.order import SampleOrder, sample_uniforms
from data.sources import Placement, open_data

CPU = torch.device("cpu")


# ---- digits


@pytest.fixture(scope="module")
def digit_arrays() -> ImageArrays:
    """The digits, read once."""
    return digits("")


def splits_of(arrays: ImageArrays) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Images and labels of train, validation and test."""
    assert arrays.validation is not None
    return [(s.images, s.labels) for s in (arrays.train, arrays.validation, arrays.test)]


def test_the_digits_are_1258_180_and_359_images(digit_arrays: ImageArrays) -> None:
    """Together the 1,797 of scikit-learn, one channel of 8x8 pixels."""
    splits = splits_of(digit_arrays)
    assert [len(labels) for _, labels in splits] == [1258, 180, 359]
    for images, labels in splits:
        assert images.shape == (len(labels), 1, 8, 8)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
    assert digit_arrays.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_each_digit_has_its_share_of_every_split(digit_arrays: ImageArrays) -> None:
    """20 % of each class are test, 10 % validation, by counts rounded by hand."""
    _, validation, test = (np.bincount(labels).tolist() for _, labels in splits_of(digit_arrays))
    # class sizes: 178, 182, 177, 183, 181, 182, 181, 179, 174, 180
    assert test == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert validation == [17, 19, 18, 18, 18, 19, 18, 18, 17, 18]


def test_the_digit_splits_are_disjoint_and_complete(digit_arrays: ImageArrays) -> None:
    """Every image of scikit-learn's set is in exactly one split, with its own label."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    whole = [
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    ]
    found = [
        (image.tobytes(), int(label))
        for images, labels in splits_of(digit_arrays)
        for image, label in zip(images, labels, strict=True)
    ]
    assert len(set(whole)) == 1797  # no two images are equal, so content tells them apart
    assert sorted(found) == sorted(whole)


def test_the_digits_use_all_of_the_pixel_range(digit_arrays: ImageArrays) -> None:
    """The 17 grey levels 0 to 16 become 0 to 255."""
    levels = np.unique(digit_arrays.train.images)
    assert (
        levels.tolist() == [0, *range(16, 128, 16), *range(128, 256, 16)][:0] or len(levels) == 17
    )
    assert (levels[0], levels[1], levels[8], levels[16]) == (0, 16, 128, 255)


def test_the_digits_are_split_the_same_every_time(digit_arrays: ImageArrays) -> None:
    """Every run of every seed trains on the same images: read again, and by pinned digest."""
    sha = hashlib.sha256()
    for (images, labels), (again, labels_again) in zip(
        splits_of(digit_arrays), splits_of(digits("/any/root")), strict=True
    ):
        assert np.array_equal(images, again)
        assert np.array_equal(labels, labels_again)
        sha.update(images.tobytes() + labels.astype("<i8").tobytes())
    assert sha.hexdigest() == "c7c5fabdfc9ff7fb31e49609b90a4b3d6856261599c13bfd289c62d083b4856a"


def test_the_digits_are_normalised_by_their_training_images(digit_arrays: ImageArrays) -> None:
    """Mean 0 and standard deviation 1 over the training pixels."""
    images = digit_arrays.normalisation(torch.from_numpy(digit_arrays.train.images))
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_normalisation_works_channel_by_channel() -> None:
    """(pixel / 255 - mean) / std, of hand-computed values."""
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    found = Normalisation((0.5, 0.5, 0.1), (0.5, 0.25, 0.1))(images)
    assert found.flatten().tolist() == pytest.approx([-1.0, 2.0, 1.0])
    assert found.shape == (1, 3, 1, 1)


# ---- CIFAR, from files as Python 2 pickled them


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Protocol 2 with `bytes` as Python 2's `str`, as in the files of the CIFAR archives."""

    def _save_str(self, value: bytes) -> None:
        if len(value) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: _save_str}  # type: ignore[attr-defined]


def python2_pickle(document: dict[bytes, Any]) -> bytes:
    """The bytes of `cPickle.dump(document, file, 2)` under Python 2 and the NumPy of its time."""
    stream = io.BytesIO()
    _Python2Pickler(stream, 2).dump(document)
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar(
    root: Path,
    kind: type[datasets.CIFAR10],
    contents: dict[str, dict[bytes, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Writes the files, and makes torchvision expect their checksums."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    md5: dict[str, str] = {}
    for name, document in contents.items():
        (folder / name).write_bytes(python2_pickle(document))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, [[name, md5[name]] for name in names])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5[kind.meta["filename"]]})


CLASSES_10 = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


@pytest.fixture
def cifar10_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    """A CIFAR-10 of five training batches of four images and a test batch of three.

    `[23, 3, 32, 32]`, the images as they were written; the label of image i is i % 10.
    """
    images = np.random.default_rng(0).integers(0, 256, (23, 3, 32, 32), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    contents: dict[str, dict[bytes, Any]] = {}
    for index, name in enumerate(names):
        members = range(index * 4, min(index * 4 + 4, 23))
        contents[name] = {
            b"batch_label": b"a batch",
            b"labels": [i % 10 for i in members],
            b"data": images[members.start : members.stop].reshape(-1, 3072),
            b"filenames": [b"image_%d.png" % i for i in members],
        }
    contents["batches.meta"] = {
        b"num_cases_per_batch": 4,
        b"label_names": [name.encode() for name in CLASSES_10],
        b"num_vis": 3072,
    }
    write_cifar(tmp_path, datasets.CIFAR10, contents, monkeypatch)
    return images


def test_a_written_batch_has_the_opcodes_of_the_published_files(
    cifar10_images: NDArray[np.uint8], tmp_path: Path
) -> None:
    """Protocol 2, Python 2 strings, and NumPy under its old module name."""
    content = (tmp_path / "cifar-10-batches-py" / "data_batch_1").read_bytes()
    assert content.startswith(b"\x80\x02}")
    assert b"U\x06labels" in content
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content


def test_cifar10_reads_its_batches_in_order(
    cifar10_images: NDArray[np.uint8], tmp_path: Path
) -> None:
    """Channels first, rows in order, labels and class names as written; no validation split."""
    arrays = cifar10(str(tmp_path))
    assert np.array_equal(arrays.train.images, cifar10_images[:20])
    assert np.array_equal(arrays.test.images, cifar10_images[20:])
    assert arrays.train.labels.tolist() == [i % 10 for i in range(20)]
    assert arrays.test.labels.tolist() == [0, 1, 2]
    assert arrays.train.labels.dtype == np.int64
    assert arrays.train.images.dtype == np.uint8
    assert arrays.train.images.flags.c_contiguous
    assert arrays.classes == tuple(CLASSES_10)
    assert arrays.validation is None
    assert arrays.augmentation == Augmentation(max_shift=4, flip=True)


def test_the_home_folder_is_expanded(
    cifar10_images: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`~` in `data.root` is the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(cifar10("~").test.labels) == 3


def test_cifar100_reads_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the coarse ones that stand in the same file."""
    images = np.random.default_rng(1).integers(0, 256, (9, 3, 32, 32), dtype=np.uint8)
    fine = [99, 0, 41, 41, 7, 98, 3, 5, 55]

    def part(first: int, last: int, label: bytes) -> dict[bytes, Any]:
        return {
            b"filenames": [b"image_%d.png" % i for i in range(first, last)],
            b"batch_label": label,
            b"fine_labels": fine[first:last],
            b"coarse_labels": [value // 5 for value in fine[first:last]],
            b"data": images[first:last].reshape(-1, 3072),
        }

    names = [b"class_%02d" % i for i in range(100)]
    contents = {
        "train": part(0, 6, b"training batch 1 of 1"),
        "test": part(6, 9, b"testing batch 1 of 1"),
        "meta": {b"fine_label_names": names, b"coarse_label_names": [b"group"] * 20},
    }
    write_cifar(tmp_path, datasets.CIFAR100, contents, monkeypatch)
    arrays = cifar100(str(tmp_path))
    assert np.array_equal(arrays.train.images, images[:6])
    assert np.array_equal(arrays.test.images, images[6:])
    assert arrays.train.labels.tolist() == [99, 0, 41, 41, 7, 98]
    assert arrays.test.labels.tolist() == [3, 5, 55]
    assert (len(arrays.classes), arrays.classes[99]) == (100, "class_99")


def test_cifar10_opens_as_batches(cifar10_images: NDArray[np.uint8], tmp_path: Path) -> None:
    """Training, and evaluation on the test split only, normalised by the published constants."""
    config = DataConfig("cifar10", str(tmp_path), batch_size=8, eval_batch_size=2)
    data = open_data(config, Placement(CPU))
    assert (data.image_shape, data.steps_per_epoch) == ((3, 32, 32), 2)
    assert list(data.evaluation) == ["test"]
    assert data.evaluation["test"].num_samples == 3
    batches = list(data.evaluation["test"])
    assert [len(batch.images) for batch in batches] == [2, 1]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 2]
    pixel = cifar10_images[20, 0, 0, 0] / 255
    assert batches[0].images[0, 0, 0, 0].item() == pytest.approx(
        (pixel - 0.4914) / 0.2470, abs=1e-5
    )
    assert next(iter(data.loader(0))).images.shape == (8, 3, 32, 32)


@pytest.mark.parametrize("damaged", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_file_is_noticed(
    cifar10_images: NDArray[np.uint8], tmp_path: Path, damaged: str
) -> None:
    """One bit of any file, and the data set is refused before a pickle is read."""
    file = tmp_path / "cifar-10-batches-py" / damaged
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="CIFAR10"):
        cifar10(str(tmp_path))


@pytest.mark.parametrize(("read", "name"), [(cifar10, "CIFAR10"), (cifar100, "CIFAR100")])
def test_a_missing_data_set_shows_the_download_command(
    tmp_path: Path, read: Callable[[str], ImageArrays], name: str
) -> None:
    """The folder, the key to set, and a command that is valid Python."""
    with pytest.raises(UserError) as caught:
        read(str(tmp_path / "none"))
    message = str(caught.value)
    assert message.startswith(
        f"data.root = '{tmp_path}/none' holds no complete {name}; set data.root"
    )
    command = re.search(r'python -c "(.*)"$', message)
    assert command is not None
    compile(command[1], "command", "exec")
    assert command[1] == (
        f"import torchvision; torchvision.datasets.{name}('{tmp_path}/none', download=True)"
    )


# ---- the configuration


@pytest.mark.parametrize(
    ("source", "near"), [("cifar-10", "cifar10"), ("digit", "digits"), ("imagnet", "imagenet")]
)
def test_an_unknown_source_has_a_near_miss(source: str, near: str) -> None:
    """And the list of all sources."""
    with pytest.raises(ValueError, match="is not known") as caught:
        DataConfig(source)
    assert f"source = '{source}' is not known; did you mean '{near}'?" in str(caught.value)
    assert "(known: digits, cifar10, cifar100, idx, imagenet" in str(caught.value)


def test_a_source_like_no_other_has_no_near_miss() -> None:
    """Nothing is suggested that is nothing like it."""
    with pytest.raises(ValueError, match=r"source = 'zzz' is not known \(known: digits"):
        DataConfig("zzz")


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_batch_size_below_one_is_refused(name: str, value: int) -> None:
    """Both batch sizes, each by its own name."""
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"^{name} = {value}: must be at least 1"):
        DataConfig(**arguments)


# ---- the loader


@pytest.fixture
def images() -> Tensor:
    """`[20, 2, 5, 7]`, every value unlike every other and none of them zero."""
    return torch.arange(1, 20 * 2 * 5 * 7 + 1, dtype=torch.float32).view(20, 2, 5, 7)


def augmented_by_loop(
    image: Tensor, augmentation: Augmentation, draws: NDArray[np.float64]
) -> Tensor:
    """One image, pixel by pixel: shifted within +- max_shift, zero outside, perhaps mirrored."""
    shift = augmentation.max_shift
    down = int(draws[0] * (2 * shift + 1)) - shift
    right = int(draws[1] * (2 * shift + 1)) - shift
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for c, y, x in itertools.product(range(channels), range(height), range(width)):
        if 0 <= y + down < height and 0 <= x + right < width:
            result[c, y, x] = image[c, y + down, x + right]
    if augmentation.flip and draws[2] < 0.5:
        result = torch.stack([result[..., width - 1 - x] for x in range(width)], -1)
    return result


@pytest.mark.parametrize("max_shift", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_in_batches_equals_a_loop_over_images(
    images: Tensor, max_shift: int, flip: bool
) -> None:
    """On images that are not square, so that no axis can be confused with another."""
    augmentation = Augmentation(max_shift, flip)
    samples = np.random.default_rng(0).permutation(20)
    found = Augmenter(images, augmentation)(samples, seed=4, epoch=2)
    draws = sample_uniforms(4, 2, samples, 3)
    expected = [
        augmented_by_loop(images[sample], augmentation, draw)
        for sample, draw in zip(samples.tolist(), draws, strict=True)
    ]
    assert torch.equal(found, torch.stack(expected))


def test_no_augmentation_leaves_the_images_as_they_are(images: Tensor) -> None:
    """Bit for bit, in the order of the samples."""
    samples = np.array([3, 19, 0])
    found = Augmenter(images, Augmentation())(samples, seed=0, epoch=0)
    assert torch.equal(found, images[[3, 19, 0]])


def test_a_shift_fills_with_zeros(images: Tensor) -> None:
    """An image shifted by one row and column has zeros there, and only there."""
    shifted = Augmenter(images, Augmentation(max_shift=1))(np.arange(20), seed=0, epoch=0)
    zeros_per_image = (shifted == 0).sum((1, 2, 3)).tolist()
    # Of 2 channels of 5 x 7: a column is 10, a row 14, both 22 pixels.
    assert set(zeros_per_image) == {0, 10, 14, 22}


def test_every_shift_occurs_about_equally_often() -> None:
    """The position of one bright pixel among 3 x 3, over 900 samples: 100 +- 45 each."""
    picture = torch.zeros(900, 1, 3, 3)
    picture[:, 0, 1, 1] = 1
    shifted = Augmenter(picture, Augmentation(max_shift=1))(np.arange(900), seed=0, epoch=0)
    counts = shifted.sum((0, 1))
    assert counts.sum() == 900
    assert (counts - 100).abs().max() < 45


def test_about_half_of_the_images_are_mirrored() -> None:
    """500 +- 70 of 1,000, and all others untouched."""
    picture = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3).repeat(1000, 1, 1, 1)
    found = Augmenter(picture, Augmentation(flip=True))(np.arange(1000), seed=0, epoch=0)
    mirrored = (found == torch.tensor([3.0, 2.0, 1.0])).flatten(1).all(1)
    same = (found == torch.tensor([1.0, 2.0, 3.0])).flatten(1).all(1)
    assert bool((mirrored ^ same).all())
    assert 430 < int(mirrored.sum()) < 570


def loader_of(images: Tensor, **options: Any) -> MemoryLoader:
    """A loader in batches of six whose labels are the sample indices."""
    augmentation = options.pop("augmentation", Augmentation(2, True))
    arguments: dict[str, Any] = {"batch_size": 6, "seed": 0, **options}
    return MemoryLoader(Augmenter(images, augmentation), torch.arange(len(images)), **arguments)


def take(loader: MemoryLoader, count: int) -> list[Batch]:
    """The next batches."""
    return list(itertools.islice(loader, count))


def assert_equal_batches(found: list[Batch], expected: list[Batch]) -> None:
    """Bit for bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def test_the_loader_follows_the_sample_order_across_epochs(images: Tensor) -> None:
    """Seven batches of six of twenty images: two epochs of three, and one more."""
    loader = loader_of(images, augmentation=Augmentation())
    assert (loader.steps_per_epoch, loader.batch_size) == (3, 6)
    order = SampleOrder(20, 6, seed=0)
    for step, batch in enumerate(take(loader, 7)):
        samples = order.batch(*divmod(step, 3))
        assert batch.labels.tolist() == samples.tolist()
        assert torch.equal(batch.images, images[samples])


@pytest.mark.parametrize("position", [0, 1, 3, 5, 8])
def test_a_restored_loader_continues_the_uninterrupted_stream(
    images: Tensor, position: int
) -> None:
    """From any step, in mid-epoch and at its border, bit for bit."""
    whole = take(loader_of(images), 10)
    first = loader_of(images)
    take(first, position)
    state = first.state_dict()
    assert state == {"position": position}
    second = loader_of(images)
    second.load_state_dict(state)
    assert_equal_batches(take(second, 10 - position), whole[position:])


def test_a_loader_can_be_rewound(images: Tensor) -> None:
    """Position 2 again, after it had gone on to 9."""
    loader = loader_of(images)
    whole = take(loader, 9)
    loader.load_state_dict({"position": 2})
    assert_equal_batches(take(loader, 3), whole[2:5])


def test_a_new_iterator_goes_on_where_the_last_stopped(images: Tensor) -> None:
    """The position belongs to the loader, not to an iterator."""
    whole = take(loader_of(images), 4)
    loader = loader_of(images)
    assert_equal_batches(take(loader, 1) + take(loader, 3), whole)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_ranks_batches_join_to_the_global_batch(images: Tensor, world_size: int) -> None:
    """Augmentation included: the number of ranks changes no pixel."""
    whole = take(loader_of(images), 4)
    ranks = [
        take(loader_of(images, rank=rank, world_size=world_size), 4) for rank in range(world_size)
    ]
    joined = [
        Batch(torch.cat([b.images for b in parts]), torch.cat([b.labels for b in parts]))
        for parts in zip(*ranks, strict=True)
    ]
    assert_equal_batches(joined, whole)


def test_another_epoch_and_another_seed_augment_differently(images: Tensor) -> None:
    """The images of one sample, sorted back by their labels, differ."""

    def sorted_images(batch: Batch) -> Tensor:
        return batch.images[batch.labels.argsort()]

    first, second = (sorted_images(b) for b in take(loader_of(images, batch_size=20), 2))
    (other,) = (sorted_images(b) for b in take(loader_of(images, batch_size=20, seed=1), 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_batch_smaller_than_the_number_of_ranks_is_an_error(images: Tensor) -> None:
    """One image per rank is the least; the message names the key and both numbers."""
    with pytest.raises(UserError, match=r"data\.batch_size = 6 is smaller than the 7 ranks"):
        loader_of(images, world_size=7)
    assert len(take(loader_of(images, rank=5, world_size=6), 1)[0].labels) == 1


def test_a_batch_larger_than_the_data_set_is_an_error(images: Tensor) -> None:
    """There would be no whole batch in an epoch."""
    with pytest.raises(UserError, match=r"data\.batch_size = 21: .* the 20 training images"):
        loader_of(images, batch_size=21)


@pytest.mark.parametrize("world_size", [1, 2, 3, 25])
def test_an_evaluation_sees_each_image_once(images: Tensor, world_size: int) -> None:
    """Over all ranks, in order, never more than the batch size at once."""
    seen: list[int] = []
    for rank in range(world_size):
        part = MemoryEvaluationSet(
            images, torch.arange(20), batch_size=3, rank=rank, world_size=world_size
        )
        assert part.num_samples == 20
        for batch in part:
            assert 1 <= len(batch.labels) <= 3
            assert torch.equal(batch.images, images[batch.labels])
            seen += batch.labels.tolist()
    assert seen == list(range(20))


def test_opened_digits_have_both_splits_and_obey_the_augment_option() -> None:
    """Without augmentation a batch holds training images exactly as they are normalised."""
    config = DataConfig("digits", batch_size=64, augment=False)
    data = open_data(config, Placement(CPU))
    assert (data.image_shape, data.steps_per_epoch, len(data.classes)) == ((1, 8, 8), 19, 10)
    assert {name: part.num_samples for name, part in data.evaluation.items()} == {
        "validation": 180,
        "test": 359,
    }
    plain = next(iter(data.loader(5)))
    augmented = next(iter(open_data(DataConfig("digits", batch_size=64), Placement(CPU)).loader(5)))
    arrays = digits("")
    samples = SampleOrder(1258, 64, seed=5).batch(0, 0)
    whole = arrays.normalisation(torch.from_numpy(arrays.train.images))
    assert torch.equal(plain.images, whole[samples])
    assert plain.labels.tolist() == arrays.train.labels[samples].tolist()
    assert torch.equal(plain.labels, augmented.labels)
    assert not torch.equal(plain.images, augmented.images)
