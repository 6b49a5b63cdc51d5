"""DALI: the one module that calls it. Encoded images and windows go in, batches of pixels come out.

DALI's own readers and random numbers are not used: every input is given from outside, so that a
batch is a pure function of its inputs, and what was prefetched can be thrown away.
"""

import importlib.util
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import UserError
from data.workers import num_cpus

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""of ImageNet's training images, red, green, blue, for pixel values in [0, 1]"""
View = Literal["train", "evaluation"]


class DecodeError(Exception):
    """A batch cannot be decoded; which of its images is to blame, DALI does not say."""


@dataclass(frozen=True)
class Feed:
    """A batch as DALI takes it, `N` images.

    `encoded`: for each image its bytes, or, with `Decoding.from_paths`, the bytes of its path.
    `windows: [N, 4] int32` and `shapes: [N, 2] float32`: in the training view the part that is seen
    (x, y, width, height) and the height and width it gets; in the evaluation view the height and
    width that the whole image gets (in `shapes`) and the window out of that.
    """

    encoded: list[NDArray[np.uint8]]
    windows: NDArray[np.int32]
    shapes: NDArray[np.float32]
    flips: NDArray[np.int32]
    colours: NDArray[np.float32]
    """`[N, 3]`: factors of brightness, contrast and saturation"""


Feeds = Generator[Feed, None, None]


@dataclass(frozen=True)
class Decoding:
    """How a stream of batches is decoded, the same for all of them."""

    view: View
    device: torch.device
    batch_size: int
    """the largest batch"""
    from_paths: bool
    half: bool = False
    """float16 instead of float32; on CUDA only"""
    channels_last: bool = False
    colour: bool = False
    on_gpu: bool = False
    """decode on the GPU (DALI's `mixed`) instead of the CPU"""
    num_threads: int = 1
    prefetch: int = 2


def is_installed(module: str) -> bool:
    """Whether a module could be imported; nothing of it is, but for the package that it is in."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # that package is not there
        return False


def require_dali() -> None:
    """Raises `UserError` where DALI is not installed."""
    if not is_installed("nvidia.dali"):
        raise UserError(
            "image files are read through NVIDIA DALI, which is not installed: "
            "pip install 'tombola[dali]'"
        )


def default_threads() -> int:
    """This rank's share of the machine's cores."""
    return max(1, num_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def decoded(decoding: Decoding, feeds: Feeds) -> Iterator[Tensor]:
    """The images of each feed, `[N, C, H, W]`, normalised, on the device, in order.

    `feeds` is drawn from up to `decoding.prefetch` batches ahead. Raises `DecodeError` in the place
    of the first batch that cannot be decoded; there the stream ends.
    """
    try:
        pipeline = _build(decoding, feeds)
        gpu = decoding.device.type == "cuda"
        while True:
            # On the training's own stream, so that DALI reuses the memory only after it.
            (output,) = pipeline.run(torch.cuda.current_stream() if gpu else None)
            images = torch.from_dlpack(output.as_tensor())
            yield images.permute(0, 3, 1, 2) if decoding.channels_last else images
    except StopIteration:
        return
    except RuntimeError as error:
        raise DecodeError(_reason(str(error))) from error
    finally:
        feeds.close()  # DALI holds it in a cycle, and it holds threads


def _reason(message: str) -> str:
    """What DALI encountered, without its traceback."""
    _, _, encountered = message.partition("encountered:")
    lines = (encountered or message).strip().splitlines()
    return lines[0].strip(" :") if lines else message


def _build(decoding: Decoding, feeds: Iterator[Feed]) -> Any:
    from nvidia import dali

    gpu = decoding.device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size=decoding.batch_size,
        num_threads=decoding.num_threads,
        device_id=(decoding.device.index or 0) if gpu else None,
        prefetch_queue_depth=decoding.prefetch,
    )
    with pipeline:
        pipeline.set_outputs(_graph(decoding, feeds))
    pipeline.build()
    return pipeline


def _graph(decoding: Decoding, feeds: Iterator[Feed]) -> Any:
    """The operators, from the feeds to normalised images."""
    from nvidia.dali import fn, types

    names = ["encoded", "windows", "shapes", "flips", *(["colours"] if decoding.colour else [])]
    encoded, window, shape, flip, *colour = fn.external_source(
        source=([getattr(feed, name) for name in names] for feed in feeds),
        num_outputs=len(names),
        batch=True,
        ndim=[1, 1, 1, 0, 1][: len(names)],
        dtype=[types.UINT8, types.INT32, types.FLOAT, types.INT32, types.FLOAT][: len(names)],
    )
    if decoding.from_paths:
        encoded = fn.io.file.read(encoded)
    images = _view(decoding, encoded, window, shape)
    if decoding.device.type == "cuda" and not decoding.on_gpu:
        images = images.gpu()
    if colour:
        (factor,) = colour
        images = fn.color_twist(
            images, brightness=factor[0], contrast=factor[1], saturation=factor[2]
        )
    return fn.crop_mirror_normalize(
        images,
        mirror=flip,
        dtype=types.FLOAT16 if decoding.half else types.FLOAT,
        output_layout="HWC" if decoding.channels_last else "CHW",
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
    )


def _view(decoding: Decoding, encoded: Any, window: Any, shape: Any) -> Any:
    """The images as `decoding.view` shows them: `[height, width, 3] uint8` each.

    In training only the window is decoded. Pixels are taken as stored, without EXIF's rotation, and
    resized bilinearly with antialiasing, as torchvision does.
    """
    from nvidia import dali
    from nvidia.dali import fn, types

    # A file that is no image fails here; in a decoder it would crash the process (DALI 2.4). The
    # decoder waits for it, since its window is computed from it.
    height_width = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT32)
    stored = fn.cat(height_width[1:2], height_width[0:1])
    corner, extent = window[0:2], window[2:4]
    training = decoding.view == "train"
    images = fn.decoders.image_slice(
        encoded,
        start=corner if training else (0, 0),
        shape=dali.math.min(extent, stored - corner) if training else stored,
        axis_names="WH",
        device="mixed" if decoding.on_gpu else "cpu",
        adjust_orientation=False,
    )
    images = fn.resize(images, size=shape, interp_type=types.INTERP_LINEAR, antialias=True)
    if training:
        return images
    return fn.slice(images, start=corner, shape=extent, axis_names="WH")
