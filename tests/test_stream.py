"""Image files as batches: the same stream after any stop and on any number of ranks, and whose
pixels are torchvision's.
"""

import gc
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from jpegs import cuts, damage, encoded, opened, prepared, write_shards, write_singles
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms import functional as vision

from data.config import DataConfig
from data.errors import UserError
from data.loader import Batch
from data.order import SampleOrder, sample_uniforms
from data.sources import Data
from data.windows import CROP_DRAWS, central_squares, random_resized_crops

TRAIN, VAL = 26, 10
SEED = 5
DRAWS_OF_A_SAMPLE = 48  # for ever: another number changes every image of a run that is resumed


class Source(NamedTuple):
    """A tree of images, each a class of its own, and where its catalogue is kept."""

    root: Path
    cache: Path

    def config(self, **options: Any) -> DataConfig:
        """Of this tree: batches of 6 of 32x32 pixels, one thread, if not said otherwise."""
        small = {"batch_size": 6, "eval_batch_size": 4, "size": ("32",), "threads": 1}
        return DataConfig(f"folder:{self.root}", **{**small, **options})

    def open(self, *, place: dict[str, Any] | None = None, **options: Any) -> Data:
        """Opened anew, as by another process."""
        config = self.config(**options)
        return opened(config, self.cache, prepared(config, self.cache), **(place or {}))

    def paths(self, split: str) -> list[Path]:
        """The images in the order of their labels."""
        return sorted((self.root / split).rglob("*.JPEG"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """26 training and 10 held-out images."""
    folder = tmp_path_factory.mktemp("stream")
    return Source(write_singles(folder / "images", train=TRAIN, val=VAL), folder / "cache")


def take(data: Data, count: int, *, position: int = 0, **options: Any) -> list[Batch]:
    """`count` batches of a new loader, from `position` on."""
    loader = data.loader(SEED, **options)
    loader.load_state_dict({"position": position})
    return list(itertools.islice(loader, count))


def joined(parts: tuple[Batch, ...]) -> Batch:
    """The ranks' shares in rank order."""
    return Batch(torch.cat([b.images for b in parts]), torch.cat([b.labels for b in parts]))


def assert_equal_batches(found: list[Batch], expected: list[Batch]) -> None:
    """Bit for bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


@pytest.fixture(scope="module")
def whole(source: Source) -> list[Batch]:
    """Ten batches without a stop: two epochs of four, and two more."""
    return take(source.open(), 10)


# ---- the same stream, whatever happens


@pytest.mark.parametrize("prefetch", [2, 4])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_stream_goes_on_after_any_stop_as_if_there_had_been_none(
    source: Source, whole: list[Batch], prefetch: int, threads: int
) -> None:
    """Stopped after each of two epochs' batches: state, a new loader, and bit for bit the rest."""
    for stop in range(9):
        first = source.open(prefetch=prefetch, threads=threads).loader(SEED)
        before = list(itertools.islice(first, stop))
        state = first.state_dict()
        assert state == {"position": stop}  # and not how many were decoded ahead
        second = source.open(prefetch=prefetch, threads=threads).loader(SEED)
        second.load_state_dict(state)
        assert_equal_batches(before + list(itertools.islice(second, 10 - stop)), whole)
        assert second.state_dict() == {"position": 10}


@pytest.mark.parametrize("batch_size", [6, 7])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_batches_join_to_the_batches_of_one(
    source: Source, whole: list[Batch], batch_size: int, world_size: int
) -> None:
    """Images and labels, bit for bit, also where the ranks' shares differ in size."""
    if batch_size != 6:
        whole = take(source.open(batch_size=batch_size), 5)
    ranks = [
        take(
            source.open(batch_size=batch_size, place={"rank": rank, "world_size": world_size}),
            len(whole),
        )
        for rank in range(world_size)
    ]
    shares = [len(rank[0].labels) for rank in ranks]
    assert max(shares) - min(shares) == (batch_size % world_size != 0)
    assert_equal_batches([joined(parts) for parts in zip(*ranks, strict=True)], whole)


def test_another_number_of_ranks_can_take_over(source: Source, whole: list[Batch]) -> None:
    """Three ranks go on where two stopped."""
    two, three = (
        [source.open(place={"rank": r, "world_size": n}) for r in range(n)] for n in (2, 3)
    )
    first = zip(*(take(data, 5) for data in two), strict=True)
    rest = zip(*(take(data, 5, position=5) for data in three), strict=True)
    assert_equal_batches([joined(parts) for parts in (*first, *rest)], whole)


def test_a_loader_can_be_rewound(source: Source, whole: list[Batch]) -> None:
    """What was decoded ahead before `load_state_dict` is not handed out, by a new iterator."""
    loader = source.open(prefetch=4).loader(SEED)
    list(itertools.islice(loader, 6))
    loader.load_state_dict({"position": 2})
    assert_equal_batches(list(itertools.islice(loader, 3)), whole[2:5])
    assert loader.state_dict() == {"position": 5}


def test_an_iterator_follows_a_rewound_loader(source: Source, whole: list[Batch]) -> None:
    """And by an old one: what comes next is what the state says, as of a loader in memory."""
    loader = source.open(prefetch=4).loader(SEED)
    batches = iter(loader)
    list(itertools.islice(batches, 6))
    loader.load_state_dict({"position": 2})
    assert_equal_batches(list(itertools.islice(batches, 3)), whole[2:5])
    assert loader.state_dict() == {"position": 5}


def test_a_new_iterator_goes_on_where_the_last_stopped(source: Source, whole: list[Batch]) -> None:
    """The position belongs to the loader: a phase that ends loses none of what was prefetched."""
    loader = source.open().loader(SEED)
    parts = [list(itertools.islice(loader, count)) for count in (1, 3, 2)]
    assert_equal_batches([batch for part in parts for batch in part], whole[:6])


def test_a_batch_that_is_held_stays_as_it_was(source: Source) -> None:
    """Its memory is not used again for later batches, nor freed with the loader."""
    batches = iter(source.open().loader(SEED))
    held = list(itertools.islice(batches, 5))
    copies = [Batch(batch.images.clone(), batch.labels.clone()) for batch in held]
    list(itertools.islice(batches, 12))
    assert_equal_batches(held, copies)
    del batches
    gc.collect()
    assert_equal_batches(held, copies)
    held[0].images.add_(1)  # it is the caller's, who may change it
    assert_equal_batches(held[1:], copies[1:])


def test_shards_give_the_stream_of_the_files_in_them(
    source: Source, whole: list[Batch], tmp_path: Path
) -> None:
    """Bit for bit, from a mid-epoch position too: samples are numbered by their names."""
    shards = write_shards(source.root, tmp_path / "shards", per_shard=7)
    config = replace(source.config(), source=f"webdataset:{shards}")
    data = opened(config, tmp_path, prepared(config, tmp_path))
    assert_equal_batches(take(data, 10), whole)
    assert_equal_batches(take(data, 4, position=6), whole[6:])
    assert_equal_batches(list(data.evaluation["test"]), list(source.open().evaluation["test"]))


# ---- which samples


@pytest.mark.parametrize(("batch_size", "num_left_out"), [(13, 0), (6, 2), (26, 0)])
def test_an_epoch_shows_each_image_at_most_once(
    source: Source, batch_size: int, num_left_out: int
) -> None:
    """Exactly once where the batch size divides their number; in an order of its own."""
    data = source.open(batch_size=batch_size)
    steps = data.steps_per_epoch
    assert steps == TRAIN // batch_size
    labels = [batch.labels.tolist() for batch in take(data, 3 * steps)]
    epochs = [
        list(itertools.chain(*labels[start : start + steps]))
        for start in range(0, 3 * steps, steps)
    ]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == TRAIN - num_left_out
    assert len(set(map(tuple, epochs))) == 3


def test_the_samples_are_those_of_the_order(source: Source, whole: list[Batch]) -> None:
    """The permutation of the seed and the epoch, as for images in memory."""
    order = SampleOrder(TRAIN, 6, SEED)
    for position, batch in enumerate(whole):
        assert batch.labels.tolist() == order.batch(*divmod(position, 4)).tolist()
        assert batch.labels.dtype == torch.int64


def test_another_seed_is_another_stream(source: Source, whole: list[Batch]) -> None:
    """And the same seed the same, on the same opened data."""
    data = source.open()
    assert_equal_batches(list(itertools.islice(data.loader(SEED), 2)), whole[:2])
    other = next(iter(data.loader(SEED + 1)))
    assert other.labels.tolist() != whole[0].labels.tolist()


def test_a_batch_smaller_than_the_number_of_ranks_is_an_error(source: Source) -> None:
    """Each rank needs an image; the message names the key and both numbers."""
    with pytest.raises(UserError, match=r"data\.batch_size = 6 is smaller than the 7 ranks"):
        source.open(place={"world_size": 7})


# ---- the pixels of training


def levels(images: Tensor) -> Tensor:
    """Normalised images as they were, 0 to 255, by torchvision's constants."""
    mean = torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).double().view(3, 1, 1)
    return (images.double() * std + mean) * 255


def pixels(image: Image.Image) -> Tensor:
    """`[3, H, W]`, 0 to 255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).double()


def assert_same_pixels(found: Tensor, expected: Tensor) -> None:
    """One level at most and a fifth on average; in the outermost rows and columns 32.

    There DALI repeats pixels beyond the border, and Pillow leaves out what is not there.
    """
    difference = (found - expected).abs()
    inner = difference[:, 1:-1, 1:-1]
    assert inner.max() < 1.01
    assert inner.mean() < 0.25
    assert difference.max() < 32


def draws_of(epoch: int, samples: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[N, 48]`."""
    return sample_uniforms(SEED, epoch, samples, DRAWS_OF_A_SAMPLE)


@pytest.mark.parametrize("side", [32, 33, 160])
def test_a_training_image_is_torchvisions_crop_resize_flip_and_normalisation(
    source: Source, side: int
) -> None:
    """Of the window that the sample's draws give, shrunk or enlarged, in two epochs."""
    data, paths = source.open(size=(str(side),)), source.paths("train")
    flipped = []
    for position, batch in ((p, b) for p in (1, 6) for b in take(data, 1, position=p)):
        assert batch.images.shape == (6, 3, side, side)
        draws = draws_of(position // 4, batch.labels.numpy())
        for image, label, draw in zip(batch.images, batch.labels.tolist(), draws, strict=True):
            photograph = Image.open(paths[label]).convert("RGB")
            shape = np.array([photograph.size], np.int32)
            ((x, y, wide, tall),) = random_resized_crops(
                draw[None, :CROP_DRAWS], shape, min_area=0.08
            ).tolist()
            cut = photograph.crop((x, y, x + wide, y + tall))
            expected = pixels(vision.resize(cut, [side, side], antialias=True))
            flipped.append(bool(draw[40] < 0.5))
            assert_same_pixels(levels(image), expected.flip(2) if flipped[-1] else expected)
    assert {*flipped} == {True, False}


def test_the_least_area_is_the_configurations(source: Source) -> None:
    """With all of the area asked for, a crop shows nearly the whole image."""
    (batch,) = take(source.open(min_crop=1.0), 1)
    draws = draws_of(0, batch.labels.numpy())
    for image, label, draw in zip(batch.images, batch.labels.tolist(), draws, strict=True):
        photograph = Image.open(source.paths("train")[label])
        shape = np.array([photograph.size], np.int32)
        window = random_resized_crops(draw[None, :CROP_DRAWS], shape, min_area=1.0)[0].tolist()
        x, y, wide, tall = window
        cut = photograph.crop((x, y, x + wide, y + tall))
        expected = pixels(vision.resize(cut, [32, 32], antialias=True))
        assert_same_pixels(levels(image), expected.flip(2) if draw[40] < 0.5 else expected)


def test_without_augmentation_an_image_has_one_view(source: Source) -> None:
    """The centred square of 7/8 of its shorter side, never mirrored, the same in every epoch."""
    batches = take(source.open(augment=False, batch_size=26), 2)
    by_label = [batch.images[batch.labels.argsort()] for batch in batches]
    assert torch.equal(*by_label)
    for image, path in zip(by_label[0], source.paths("train"), strict=True):
        photograph = Image.open(path)
        shape = np.array([photograph.size], np.int32)
        x, y, side, _ = central_squares(shape, 0.875)[0].tolist()
        cut = photograph.crop((x, y, x + side, y + side))
        expected = pixels(vision.resize(cut, [32, 32], antialias=True))
        assert_same_pixels(levels(image), expected)


def affine_map(before: Tensor, after: Tensor) -> tuple[Tensor, float, bool]:
    """The colour matrix `[3, 3]` from one image to another, and the largest misfit of a pixel.

    And whether the image has so many colours, not cut off at 0 or 255, that they determine it.
    """
    colours, targets = before.flatten(1).T, after.flatten(1).T
    inside = ((targets > 1) & (targets < 254)).all(1)
    if int(inside.sum()) < 100:
        return torch.eye(3), 0.0, False
    colours, targets = colours[inside], targets[inside]
    inputs = torch.cat([colours, torch.ones(len(colours), 1)], 1)
    fitted = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution
    misfit = (inputs @ fitted - targets).abs().max().item()
    spread = torch.linalg.svdvals(colours - colours.mean(0))[-1].item()
    return fitted[:3].T, misfit, spread > 200


def test_colour_jitter_changes_colours_and_nothing_else(source: Source) -> None:
    """Every pixel by one affine map of its colour, whose factors the sample's draws give.

    Grey stays grey, at brightness times contrast; the two other directions shrink or grow by the
    saturation too.
    """
    num_determined = 0
    both = (take(source.open(size=("96",), color_jitter=jitter), 4) for jitter in (0, 0.4))
    for plain, batch in zip(*both, strict=True):
        assert torch.equal(plain.labels, batch.labels)
        factors = 1 + 0.4 * (2 * draws_of(0, batch.labels.numpy())[:, 41:44] - 1)
        for before, after, (brightness, contrast, saturation) in zip(
            levels(plain.images), levels(batch.images), factors.tolist(), strict=True
        ):
            assert not torch.equal(before, after)
            matrix, misfit, determined = affine_map(before, after)
            assert misfit < 1.5
            if not determined:
                continue
            assert matrix.sum(1).tolist() == pytest.approx([brightness * contrast] * 3, abs=0.03)
            volume = (brightness * contrast) ** 3 * saturation**2
            assert torch.linalg.det(matrix).item() == pytest.approx(volume, rel=0.1)
            num_determined += 1
    assert num_determined >= 6


def test_colour_jitter_leaves_the_evaluation_alone(source: Source) -> None:
    """It is an augmentation."""
    plain, jittered = (source.open(color_jitter=j).evaluation["test"] for j in (0.0, 0.4))
    assert_equal_batches(list(jittered), list(plain))


def test_each_epoch_has_its_size(source: Source) -> None:
    """Also where batches of the next epoch are decoded ahead; the windows stay the same."""
    sizes = {0: 32, 1: 48, 2: 40}
    data = source.open(size=("32", "48@1ep"), prefetch=4)
    batches = take(data, 9, size_of_epoch=sizes.__getitem__)
    assert [batch.images.shape[2:] for batch in batches] == [
        (sizes[position // 4],) * 2 for position in range(9)
    ]
    resumed = take(data, 4, position=5, size_of_epoch=sizes.__getitem__)
    assert_equal_batches(resumed, batches[5:])
    assert next(iter(data.loader(SEED))).images.shape[2:] == (48, 48)  # without a schedule
    assert data.image_shape == (3, 48, 48)
    assert data.all_shapes == ((3, 32, 32), (3, 48, 48))


def test_channels_last_changes_the_strides_and_no_value(source: Source, whole: list[Batch]) -> None:
    """In training and in evaluation."""
    data, plain = source.open(place={"channels_last": True}), source.open()
    found = take(data, 2) + list(data.evaluation["test"])
    expected = whole[:2] + list(plain.evaluation["test"])
    assert_equal_batches(found, expected)
    for one, other in zip(found, expected, strict=True):
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        assert other.images.is_contiguous()


def test_images_on_the_cpu_are_float32(source: Source) -> None:
    """Whatever precision the training computes in."""
    data = source.open(place={"dtype": torch.bfloat16})
    for batch in (*take(data, 1), next(iter(data.evaluation["test"]))):
        assert (batch.images.dtype, batch.labels.dtype) == (torch.float32, torch.int64)


# ---- the evaluation


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (64, 73), (33, 41)])
def test_an_evaluated_image_is_torchvisions_resize_and_centre_crop(
    source: Source, size: int, resize: int
) -> None:
    """Every pixel within one level, a fifth of a level on average."""
    images = source.open(eval_size=size, eval_resize=resize).evaluation["test"]
    found = levels(torch.cat([batch.images for batch in images]))
    paths = source.paths("val")
    assert len(found) == images.num_samples == VAL
    for image, path in zip(found, paths, strict=True):
        photograph = Image.open(path)
        difference = (image - pixels(CenterCrop(size)(Resize(resize)(photograph)))).abs()
        assert difference.max() < 1.01
        assert difference.mean() < 0.25


def test_an_evaluation_without_a_margin_differs_at_the_border_only(source: Source) -> None:
    """`eval_resize` equal to `eval_size`: what is cut off is cut off the longer side."""
    images = source.open(eval_size=65, eval_resize=65).evaluation["test"]
    found = levels(torch.cat([batch.images for batch in images]))
    for image, path in zip(found, source.paths("val"), strict=True):
        assert_same_pixels(image, pixels(CenterCrop(65)(Resize(65)(Image.open(path)))))


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
@pytest.mark.parametrize("batch_size", [1, 4, 300])
def test_an_evaluation_sees_each_image_once(
    source: Source, batch_size: int, world_size: int
) -> None:
    """Over all ranks, in order, and twice the same; also a rank that has none of the images."""
    reference = torch.cat([batch.images for batch in source.open().evaluation["test"]])
    labels: list[int] = []
    for rank in range(world_size):
        data = source.open(
            batch_size=12,
            eval_batch_size=batch_size,
            place={"rank": rank, "world_size": world_size},
        )
        part = data.evaluation["test"]
        assert part.num_samples == VAL
        batches = list(part)
        assert_equal_batches(list(part), batches)
        for batch in batches:
            assert 1 <= len(batch.labels) <= batch_size
            assert torch.equal(batch.images, reference[batch.labels])
            labels += batch.labels.tolist()
    assert labels == list(range(VAL))


def test_training_images_are_measured_as_an_evaluation_shows_them(source: Source) -> None:
    """All of them, or some evenly spread: decoded, cropped and ordered like held-out images."""
    everything = list(source.open().training_images())
    assert torch.cat([batch.labels for batch in everything]).tolist() == list(range(TRAIN))
    images = torch.cat([batch.images for batch in everything])
    assert images.shape == (TRAIN, 3, 32, 32)
    again = torch.cat([batch.images for batch in source.open(augment=False).training_images()])
    assert torch.equal(images, again)
    for world_size in (1, 3):
        some = [
            batch
            for rank in range(world_size)
            for batch in source.open(
                place={"rank": rank, "world_size": world_size}
            ).training_images(5)
        ]
        chosen = torch.arange(5) * TRAIN // 5
        assert torch.cat([batch.labels for batch in some]).equal(chosen)
        assert torch.cat([batch.images for batch in some]).equal(images[chosen])


def test_training_images_that_cannot_be_decoded_are_found_and_left_out(tmp_path: Path) -> None:
    """Each rank finds those of its share; the rest is measured, each image once."""
    root = write_singles(tmp_path / "images", train=TRAIN, val=VAL)
    damaged = Source(root, tmp_path / "cache")
    for number in (3, 4, 20):
        damage(damaged.paths("train")[number])
    for world_size in (1, 2):
        bad, labels = [], []
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size}
            data = damaged.open(place=place, on_bad="skip")
            bad += data.training_images().undecodable()
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size}
            images = damaged.open(place=place, on_bad="skip").training_images(without=bad)
            assert images.num_samples == TRAIN - 3
            labels += [label for batch in images for label in batch.labels.tolist()]
        assert bad == [3, 4, 20]
        assert labels == [label for label in range(TRAIN) if label not in bad]


def test_an_evaluation_that_is_left_halfway_starts_anew(source: Source) -> None:
    """While a training goes on beside it, whose batches do not change."""
    data = source.open()
    batches = iter(data.loader(SEED))
    found = [next(batches)]
    for _ in range(2):
        first = next(iter(data.evaluation["test"]))
        assert first.labels.tolist() == [0, 1, 2, 3]
        found.append(next(batches))
    assert_equal_batches(found, take(data, 3))


# ---- kinds of files


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The same picture in every form that an image file has, each a class of its own."""
    folder = tmp_path_factory.mktemp("forms")
    image = cuts(0, 1)[0]
    other = image.transpose(Image.Transpose.ROTATE_180)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    forms: dict[str, bytes] = {
        "jpeg-baseline.jpg": encoded(image, quality=90),
        "jpeg-cmyk.jpg": encoded(image.convert("CMYK")),
        "jpeg-exif.jpeg": encoded(image, quality=90, exif=exif),
        "jpeg-full-chroma.JPG": encoded(image, subsampling=0),
        "jpeg-grey.JPEG": encoded(image.convert("L")),
        "jpeg-progressive.jpg": encoded(image, progressive=True),
        "bmp.bmp": encoded(image, "BMP"),
        "mpo.jpg": encoded(image, "MPO", save_all=True, append_images=[other]),
        "png.png": encoded(image, "PNG"),
        "png-alpha.png": encoded(image.convert("RGBA"), "PNG"),
        "png-bilevel.png": encoded(image.convert("1"), "PNG"),
        "png-grey.png": encoded(image.convert("L"), "PNG"),
        "png-named.JPEG": encoded(image, "PNG"),
        "png-palette.png": encoded(image.convert("P"), "PNG"),
        "tiff.tiff": encoded(image, "TIFF"),
        "tiff-lzw.tif": encoded(image, "TIFF", compression="tiff_lzw"),
        "webp.webp": encoded(image, "WEBP"),
        "webp-animated.webp": encoded(image, "WEBP", save_all=True, append_images=[other]),
    }
    for name, content in forms.items():
        for split in ("train", "val"):
            place = folder / "images" / split / name.partition(".")[0] / name
            place.parent.mkdir(parents=True)
            place.write_bytes(content)
    return Source(folder / "images", folder / "cache")


def test_every_kind_of_image_file_is_read_as_pillow_reads_it(mixed: Source) -> None:
    """In RGB, of several pictures the first, and as stored: no EXIF rotation, as in torchvision."""
    data = mixed.open(batch_size=6, augment=False, eval_size=48, eval_resize=64)
    paths = sorted(path for path in (mixed.root / "val").rglob("*.*"))
    found = levels(torch.cat([batch.images for batch in data.evaluation["test"]]))
    assert len(found) == len(paths) == len(data.classes) == 18
    for image, path in zip(found, paths, strict=True):
        expected = pixels(CenterCrop(48)(Resize(64)(Image.open(path).convert("RGB"))))
        assert (image - expected).abs().max() < 1.01, path.name
    for batch in take(data, 3):
        for image, label in zip(levels(batch.images), batch.labels.tolist(), strict=True):
            photograph = Image.open(paths[label]).convert("RGB")
            x, y, side, _ = central_squares(np.array([photograph.size], np.int32), 0.875)[0]
            cut = photograph.crop((x, y, x + side, y + side))
            assert_same_pixels(image, pixels(vision.resize(cut, [32, 32], antialias=True)))


def test_images_of_one_pixel_and_of_extreme_shapes_are_shown(tmp_path: Path) -> None:
    """1x1, 1x200 and 200x1: enlarged to the size like any other."""
    for split in ("train", "val"):
        for index, shape in enumerate([(1, 1), (1, 200), (200, 1), (3, 2)]):
            folder = tmp_path / "images" / split / f"c{index}"
            folder.mkdir(parents=True)
            Image.new("RGB", shape, (10, 200, 50 * index)).save(folder / "image.png")
    data = Source(tmp_path / "images", tmp_path / "cache").open(batch_size=4)
    batches = [*take(data, 3), *data.evaluation["test"]]
    for batch in batches:
        assert batch.images.shape == (4, 3, 32, 32)
        for image, label in zip(levels(batch.images), batch.labels.tolist(), strict=True):
            colour = torch.tensor([10.0, 200.0, 50.0 * label]).view(3, 1, 1)
            assert (image - colour).abs().max() < 1.01
