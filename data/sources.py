"""Opens a configuration's data set: the one place that knows which loader serves which source."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.arrays import READERS, ImageArrays, Split
from data.augment import Augmentation, Augmenter, Preprocessing
from data.catalogue import Catalogue, Manifest, Progress, silent
from data.cataloguing import cache_name, load_catalogue, make_catalogue
from data.config import DataConfig
from data.encoded import EncodedImages
from data.errors import UserError
from data.files import Folder
from data.loader import EvaluationSet, Loader, MemoryEvaluationSet, MemoryLoader
from data.order import SampleOrder
from data.pipeline import MEAN, STD, Decoding, default_threads, require_dali
from data.record import Record, record_of_arrays, record_of_files
from data.stream import FileEvaluationSet, FileLoader, SizeOfEpoch, TrainingView

_MOST_EVALUATED = 256  # decoded images wait in memory, several batches of them


class MakeLoader(Protocol):
    """Makes loaders of the training images."""

    def __call__(
        self,
        seed: int,
        size_of_epoch: SizeOfEpoch | None = None,
        *,
        batch_size: int | None = None,
    ) -> Loader:
        """A loader of a random stream; image files get the size that an epoch has.

        Its global batches are those of the configuration, or of `batch_size` images.
        """
        ...


class MakeEvaluationSet(Protocol):
    """Makes evaluations of the training images."""

    def __call__(
        self, num_images: int | None = None, *, without: Sequence[int] = ()
    ) -> EvaluationSet:
        """That many images, spread evenly over the data set, or all; some left out."""
        ...


@dataclass(frozen=True)
class Data:
    """An opened data set: `loader(seed)` for training, `evaluation[split]` for measuring."""

    image_shape: tuple[int, int, int]
    """of the largest training images: channels, height, width"""
    all_shapes: tuple[tuple[int, int, int], ...]
    """the smallest and largest shapes that a network meets in training, and that in evaluation"""
    classes: tuple[str, ...]
    steps_per_epoch: int
    loader: MakeLoader
    evaluation: dict[str, EvaluationSet]
    preprocessing: Preprocessing
    """of the evaluation"""
    training_images: MakeEvaluationSet
    """the training images as an evaluation shows them, not augmented"""


@dataclass(frozen=True)
class Placement:
    """For whom batches are made: a rank, its device, and the form in which it wants images."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    """on CUDA; elsewhere images are float32"""
    channels_last: bool = False


def prepare_data(
    config: DataConfig, cache: Folder, progress: Progress = silent
) -> tuple[Record, str]:
    """Looks at the data once, before any rank opens them: their record, and a token for those.

    Of image files, the catalogue is made or brought up to date in `cache`. Raises `UserError` where
    the data are missing, or images are bad and may not be skipped.
    """
    if config.kind in READERS:
        return record_of_arrays(config.kind, READERS[config.kind](config.place)), ""
    require_dali()
    name = cache_name(config.kind, config.place)
    kept = cache.read(name) if cache.exists(name) else None
    catalogue = make_catalogue(config.kind, config.place, kept=kept, progress=progress)
    content = catalogue.to_bytes()
    if content != kept:
        cache.write(name, content)
    _check(catalogue, config)
    return record_of_files(config.kind, catalogue), hashlib.sha256(content).hexdigest()


def _check(catalogue: Catalogue, config: DataConfig) -> None:
    where = f"data.root = {config.place!r}"
    if "train" not in catalogue.splits:
        raise UserError(f"{where}: there are no training images")
    if len(catalogue.splits) == 1:
        raise UserError(f"{where}: nothing is held out, as val or test")
    train = catalogue.splits["train"]
    counts = np.bincount(train.labels, minlength=len(catalogue.classes))
    if not counts.all():
        name = catalogue.classes[int(np.argmin(counts))]
        raise UserError(f"{where}: class {name!r} has no training images")
    for split, manifest in catalogue.splits.items():
        if len(manifest) == 0:
            raise UserError(f"{where}: there are no {split} images")
        bad = np.flatnonzero(manifest.problems)
        if len(bad) and (split != "train" or config.on_bad == "error"):
            first = int(bad[0])
            remedy = "mend or remove them (`tombola data verify` lists them all)"
            if split == "train":
                remedy += ", or go on without them with --data.on-bad skip"
            raise UserError(
                f"{where}: {len(bad)} of {len(manifest)} {split} images cannot be used: "
                f"{manifest.where(first)} is {manifest.problem(first)}"
                f"{' ...' if len(bad) > 1 else ''}; {remedy}"
            )


def open_data(
    config: DataConfig, place: Placement, *, cache: Folder | None = None, token: str = ""
) -> Data:
    """Opens the data set of `config` for one rank.

    Image files are opened by the catalogue that `prepare_data` left in `cache`, and by the `token`
    that it gave. Raises `UserError` where the data are missing.
    """
    if config.kind in READERS:
        return _open_arrays(config, READERS[config.kind](config.place), place)
    assert cache is not None
    content = cache.read(cache_name(config.kind, config.place))
    if hashlib.sha256(content).hexdigest() != token:
        raise UserError(
            f"{cache}: this rank sees another catalogue of the images than rank 0; all ranks need "
            "the same --root and data.manifest"
        )
    return _open_files(config, load_catalogue(content, config.kind, config.place), place)


def _open_arrays(config: DataConfig, arrays: ImageArrays, place: Placement) -> Data:
    def resident(split: Split) -> tuple[Tensor, Tensor]:
        images = arrays.normalisation(torch.from_numpy(split.images).to(place.device))
        return images, torch.from_numpy(split.labels).to(place.device)

    images, labels = resident(arrays.train)
    augmenter = Augmenter(images, arrays.augmentation if config.augment else Augmentation())

    def loader(
        seed: int, size_of_epoch: SizeOfEpoch | None = None, *, batch_size: int | None = None
    ) -> MemoryLoader:
        return MemoryLoader(
            augmenter,
            labels,
            batch_size=batch_size or config.batch_size,
            seed=seed,
            rank=place.rank,
            world_size=place.world_size,
        )

    def evaluated(images: Tensor, labels: Tensor) -> MemoryEvaluationSet:
        return MemoryEvaluationSet(
            images,
            labels,
            batch_size=config.eval_batch_size,
            rank=place.rank,
            world_size=place.world_size,
        )

    def training_images(
        num_images: int | None = None, *, without: Sequence[int] = ()
    ) -> MemoryEvaluationSet:
        chosen = np.setdiff1d(_spread(len(arrays.train.labels), num_images), without)
        train = Split(arrays.train.images[chosen], arrays.train.labels[chosen])
        return evaluated(*resident(train))

    held_out = {"validation": arrays.validation, "test": arrays.test}
    evaluation: dict[str, EvaluationSet] = {
        name: evaluated(*resident(split)) for name, split in held_out.items() if split is not None
    }
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    normalisation = arrays.normalisation
    return Data(
        image_shape=shape,
        all_shapes=(shape,),
        classes=arrays.classes,
        steps_per_epoch=loader(0).steps_per_epoch,
        loader=loader,
        evaluation=evaluation,
        preprocessing=Preprocessing(shape, normalisation.mean, normalisation.std),
        training_images=training_images,
    )


def _open_files(config: DataConfig, catalogue: Catalogue, place: Placement) -> Data:
    def encoded(split: str) -> EncodedImages:
        return EncodedImages(catalogue.root, catalogue.splits[split])

    train = encoded("train")
    sizes = [size for size, _ in config.sizes]
    dtype = place.dtype if place.device.type == "cuda" else torch.float32
    ranks = {"rank": place.rank, "world_size": place.world_size}

    def loader(
        seed: int, size_of_epoch: SizeOfEpoch | None = None, *, batch_size: int | None = None
    ) -> FileLoader:
        return FileLoader(
            train,
            _decoding(config, train.manifest, place, dtype),
            TrainingView(config.augment, config.min_crop, config.color_jitter),
            order=SampleOrder(len(train.manifest), batch_size or config.batch_size, seed),
            size_of_epoch=size_of_epoch or (lambda epoch: sizes[-1]),
            dtype=dtype,
            on_bad=config.on_bad,
            **ranks,
        )

    def evaluated(split: str, images: NDArray[np.int64] | None = None) -> FileEvaluationSet:
        return FileEvaluationSet(
            encoded(split),
            _decoding(config, catalogue.splits[split], place, dtype, training=False),
            images=images,
            resize=config.evaluation_resize,
            size=config.evaluation_size,
            dtype=dtype,
            **ranks,
        )

    def training_images(
        num_images: int | None = None, *, without: Sequence[int] = ()
    ) -> FileEvaluationSet:
        usable = np.flatnonzero(train.manifest.problems == 0)
        chosen = usable[_spread(len(usable), num_images)]
        return evaluated("train", np.setdiff1d(chosen, without))

    evaluation: dict[str, EvaluationSet] = {
        split: evaluated(split) for split in catalogue.splits if split != "train"
    }
    largest = max(sizes)
    sides = sorted({min(sizes), largest, config.evaluation_size})
    return Data(
        image_shape=(3, largest, largest),
        all_shapes=tuple((3, side, side) for side in sides),
        classes=catalogue.classes,
        steps_per_epoch=loader(0).steps_per_epoch,
        loader=loader,
        evaluation=evaluation,
        preprocessing=Preprocessing(
            (3, config.evaluation_size, config.evaluation_size),
            MEAN,
            STD,
            config.evaluation_resize,
        ),
        training_images=training_images,
    )


def _spread(num_images: int, num_chosen: int | None) -> NDArray[np.int64]:
    """The numbers of all images, or of `num_chosen` spread evenly over them."""
    if num_chosen is None or num_chosen >= num_images:
        return np.arange(num_images)
    return np.arange(num_chosen) * num_images // num_chosen


def decoder_of(config: DataConfig, device: torch.device) -> Literal["cpu", "gpu"]:
    """What decodes the image files of a configuration. Raises `UserError` without that GPU."""
    gpu = device.type == "cuda"
    if config.decoder == "gpu" and not gpu:
        raise UserError("data.decoder = 'gpu': there is no GPU; choose 'auto' or 'cpu'")
    return "gpu" if gpu and config.decoder != "cpu" else "cpu"


def _decoding(
    config: DataConfig,
    manifest: Manifest,
    place: Placement,
    dtype: torch.dtype,
    *,
    training: bool = True,
) -> Decoding:
    threads = config.threads or default_threads()
    return Decoding(
        view="train" if training else "evaluation",
        device=place.device,
        batch_size=min(config.eval_batch_size, _MOST_EVALUATED),
        from_paths=not manifest.in_shards,
        half=dtype != torch.float32,
        channels_last=place.channels_last,
        colour=training and config.color_jitter > 0,
        on_gpu=decoder_of(config, place.device) == "gpu",
        num_threads=threads,
        prefetch=config.prefetch or (2 if threads < 4 else 3),
    )
