"""The loaders that `tombola bench loader` compares: ours, DALI's own reader, and others.

Each reads the same tree of image files and makes the same training batches: random resized crop to
224, flip, normalised. They are written as their own documentation shows them.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, io, transforms
from torchvision.transforms import v2

from data.config import DataConfig
from data.files import Folder
from data.pipeline import MEAN, STD, default_threads
from data.sources import Placement, open_data, prepare_data

SIZE = 224
Open = Callable[[], Iterator[Tensor]]
"""starts a loader, and gives its batches without end"""


def contenders(root: Path, scratch: Path, batch_size: int) -> dict[str, Open]:
    """Every loader that can run here, ours first."""
    cuda = torch.cuda.is_available()
    found: dict[str, Open] = {"tombola": lambda: ours(root, scratch, batch_size, "auto")}
    if cuda:
        found["tombola, decoding on CPU"] = lambda: ours(root, scratch, batch_size, "cpu")
    found["DALI's own reader"] = lambda: dali_reader(root, batch_size)
    found["DALI, decoding only"] = lambda: dali_decoding(root, batch_size)
    found["torchvision, PIL"] = lambda: torchvision_pil(root, batch_size)
    found["torchvision, decode_jpeg and v2"] = lambda: torchvision_v2(root, batch_size)
    if importlib.util.find_spec("webdataset"):
        found["webdataset, PIL"] = lambda: webdataset(scratch / "packed", batch_size)
    if importlib.util.find_spec("ffcv"):
        found["ffcv, JPEG"] = lambda: ffcv(scratch / "train.beton", batch_size)
    return found


def prepare(root: Path, scratch: Path) -> None:
    """Writes the forms of the data that some of the loaders read."""
    if importlib.util.find_spec("webdataset"):
        from data.pack import pack

        pack("folder", str(root), Folder(scratch / "packed"))
    if importlib.util.find_spec("ffcv"):
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
        writer = DatasetWriter(str(scratch / "train.beton"), fields, num_workers=default_threads())
        writer.from_indexed_dataset(datasets.ImageFolder(root / "train"))


def ours(root: Path, scratch: Path, batch_size: int, decoder: Any) -> Iterator[Tensor]:
    """This project's training view."""
    config = DataConfig("folder", str(root), batch_size=batch_size, decoder=decoder)
    cache = Folder(scratch / "manifests")
    _, token = prepare_data(config, cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = open_data(config, Placement(device), cache=cache, token=token)
    for batch in data.loader(0):
        yield batch.images


def dali_reader(root: Path, batch_size: int) -> Iterator[Tensor]:
    """`fn.readers.file` with the fused random-crop decoder: DALI's order and random numbers."""
    return _dali(root, batch_size, decode_only=False)


def dali_decoding(root: Path, batch_size: int) -> Iterator[Tensor]:
    """`fn.readers.file` and whole images decoded, and nothing else: what no loader can pass."""
    return _dali(root, batch_size, decode_only=True)


def _dali(root: Path, batch_size: int, *, decode_only: bool) -> Iterator[Tensor]:
    from nvidia import dali
    from nvidia.dali import fn, types

    cuda = torch.cuda.is_available()
    device = "mixed" if cuda else "cpu"
    pipeline = dali.Pipeline(
        batch_size=batch_size,
        num_threads=default_threads(),
        device_id=0 if cuda else None,
        prefetch_queue_depth=2,
    )
    with pipeline:
        encoded, _ = fn.readers.file(
            file_root=str(root / "train"), shuffle_after_epoch=True, pad_last_batch=True
        )
        if decode_only:  # one pixel of each leaves DALI: copies are not what is measured
            images = fn.decoders.image(encoded, device=device)
            pipeline.set_outputs(fn.slice(images, start=(0, 0), shape=(1, 1), axis_names="WH"))
        else:
            images = fn.decoders.image_random_crop(
                encoded, device=device, random_area=(0.08, 1.0), random_aspect_ratio=(3 / 4, 4 / 3)
            )
            images = fn.resize(images, size=(SIZE, SIZE), antialias=True)
            images = fn.crop_mirror_normalize(
                images,
                mirror=fn.random.coin_flip(),
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in MEAN],
                std=[255 * value for value in STD],
            )
            pipeline.set_outputs(images)
    pipeline.build()
    while True:
        (output,) = pipeline.run()
        yield torch.from_dlpack(output.as_tensor())


def torchvision_pil(root: Path, batch_size: int) -> Iterator[Tensor]:
    """The DataLoader of torchvision's reference training: PIL, one worker a core."""
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return _endless(datasets.ImageFolder(root / "train", view), batch_size)


def torchvision_v2(root: Path, batch_size: int) -> Iterator[Tensor]:
    """`decode_jpeg` to tensors, and the v2 transforms on them."""
    view = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def read(path: str) -> Tensor:
        pixels: Tensor = io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)
        return pixels

    return _endless(datasets.ImageFolder(root / "train", view, loader=read), batch_size)


def _endless(images: Dataset[Any], batch_size: int) -> Iterator[Tensor]:
    loader = DataLoader(
        images,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=default_threads(),
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )
    while True:
        for batch, _ in loader:
            yield batch.cuda(non_blocking=True) if torch.cuda.is_available() else batch


def webdataset(folder: Path, batch_size: int) -> Iterator[Tensor]:
    """The webdataset package over packed shards: PIL, one worker a core."""
    import webdataset as wds

    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    shards = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    samples = wds.WebDataset(shards, shardshuffle=False, resampled=True).shuffle(256).decode("pil")
    batches = samples.to_tuple("jpg", "cls").map_tuple(view, int).batched(batch_size)
    loader = wds.WebLoader(batches, batch_size=None, num_workers=default_threads())
    for images, _ in loader:
        yield images


def ffcv(beton: Path, batch_size: int) -> Iterator[Tensor]:
    """FFCV over JPEGs in its own file format."""
    import numpy as np
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    mean, std = 255 * np.array(MEAN), 255 * np.array(STD)
    view = [
        RandomResizedCropRGBImageDecoder((SIZE, SIZE)),
        RandomHorizontalFlip(),
        NormalizeImage(mean, std, np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    loader = Loader(
        str(beton),
        batch_size=batch_size,
        num_workers=default_threads(),
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": view, "label": [IntDecoder(), ToTensor()]},
    )
    while True:
        for images, _ in loader:
            yield images
