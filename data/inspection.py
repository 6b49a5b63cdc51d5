"""What is wrong with single images: a worker reads each of them whole, and decodes it twice.

Pillow decodes every file, and DALI, which training decodes with, those that Pillow could: on
anything else DALI 2.4 may crash. Whatever crashes takes only its own process with it.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from data.files import Folder
from data.pipeline import DecodeError, Decoding, Feed, decoded
from data.scan import PROBLEMS, scan_bytes
from data.workers import Crashed, in_workers

Flaw = tuple[str, str]
"""a kind of finding, and the detail"""
Decode = Callable[[Sequence[bytes]], list[str]]
"""for each of several encoded images, why it cannot be decoded, or an empty string"""

_CHUNK = 64  # held encoded, all of them
_BATCH = 16  # held decoded, a few batches of them
_SIDE = 32
_EXTENSIONS = {
    "JPEG": ("jpg", "jpeg"),
    "MPO": ("jpg", "jpeg"),
    "PNG": ("png",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
}
_GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "F")
_DECODED = frozenset(("grayscale", "cmyk", "misnamed", "orientation"))
"""flaws of an image that can be decoded"""


class Sample(NamedTuple):
    """An image, by where its bytes are: a file below the root, or a part of a shard there."""

    split: str
    label: int
    name: str
    shard: str = ""
    offset: int = 0
    num_bytes: int = 0

    @property
    def where(self) -> str:
        """How to name it to a person: its path, or shard and name."""
        name = self.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return f"{self.shard}:{name}" if self.shard else name


class Inspected(NamedTuple):
    """What an image has wrong, and the digest of its bytes where there are any."""

    flaws: list[Flaw]
    digest: bytes | None


class _Chunk(NamedTuple):
    root: str
    samples: Sequence[Sample]
    decode: Decode | None


def inspect(
    root: str, samples: Sequence[Sample], *, decode: Decode | None, num_workers: int
) -> Iterator[tuple[int, Inspected]]:
    """`(index, what was found)` of every sample, in no particular order.

    The samples at which a worker died are inspected again, one by one, to learn which it was.
    """
    size = min(_CHUNK, max(1, len(samples) // (4 * num_workers)))
    starts = range(0, len(samples), size)
    chunks = [_Chunk(root, samples[start : start + size], decode) for start in starts]
    crashed: dict[range, Crashed] = {}
    for task, found in in_workers(inspect_chunk, chunks, num_workers=num_workers):
        indices = range(starts[task], starts[task] + len(chunks[task].samples))
        if isinstance(found, Crashed):
            crashed[indices] = found
        else:
            yield from zip(indices, found, strict=True)
    yield from _one_by_one(root, samples, crashed, decode=decode, num_workers=num_workers)


def _one_by_one(
    root: str,
    samples: Sequence[Sample],
    crashed: dict[range, Crashed],
    *,
    decode: Decode | None,
    num_workers: int,
) -> Iterator[tuple[int, Inspected]]:
    indices = [index for chunk in crashed for index in chunk]
    chunks = [_Chunk(root, [samples[index]], decode) for index in indices]
    results: dict[int, Inspected] = {}
    alone: set[int] = set()
    for task, found in in_workers(inspect_chunk, chunks, num_workers=num_workers):
        if isinstance(found, Crashed):
            alone.add(indices[task])
            flaw = ("crash", f"decoding it ended the process: {found}")
            results[indices[task]] = Inspected([flaw], None)
        else:
            results[indices[task]] = found[0]
    for chunk, crash in crashed.items():
        if alone.isdisjoint(chunk):
            detail = f"decoding {len(chunk)} images from this one on ended the process: {crash}"
            results[chunk[0]].flaws.append(("crash", f"{detail}; each alone did not"))
    yield from results.items()


def inspect_chunk(chunk: _Chunk) -> list[Inspected]:
    """Reads and decodes the samples of a chunk, in a worker."""
    with _silence():
        contents = [_content(chunk.root, sample) for sample in chunk.samples]
        flaws = [
            [("unreadable", content)] if isinstance(content, str) else look(sample.name, content)
            for sample, content in zip(chunk.samples, contents, strict=True)
        ]
        sound = [i for i, found in enumerate(flaws) if _DECODED.issuperset(k for k, _ in found)]
        if chunk.decode is not None and sound:
            images = [content for i in sound if isinstance(content := contents[i], bytes)]
            for index, reason in zip(sound, chunk.decode(images), strict=True):
                if reason:
                    flaws[index].append(("undecodable", f"DALI: {reason}"))
    digests = [hashlib.sha256(c).digest() if c and isinstance(c, bytes) else None for c in contents]
    return [Inspected(*both) for both in zip(flaws, digests, strict=True)]


def _content(root: str, sample: Sample) -> bytes | str:
    """The bytes of a sample, or why there are none."""
    try:
        if sample.shard:
            return Folder(root).read_range(sample.shard, sample.offset, sample.num_bytes)
        with open(os.path.join(root, sample.name), "rb") as file:
            return file.read()
    except OSError as error:
        return error.strerror or str(error)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Sends what decoders write on stderr nowhere: it names no file."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# Pillow ----------------------------------------------------------------------------------


def look(name: str, content: bytes) -> list[Flaw]:
    """What Pillow finds wrong with an image file: never raises for what is in it."""
    problem = PROBLEMS[scan_bytes(content).problem]
    if problem:
        return [(kind_of(problem), _explain(problem, content))]
    try:
        with Image.open(io.BytesIO(content)) as image:
            form, mode = str(image.format), image.mode
            image.load()
    except Exception as error:  # malformed pixels can raise anything
        kind = "truncated" if "truncated" in str(error).lower() else "undecodable"
        return [(kind, f"Pillow: {str(error) or type(error).__name__}")]
    flaws = []
    if mode in _GRAY:
        flaws.append(("grayscale", f"mode {mode}"))
    if mode == "CMYK":
        flaws.append(("cmyk", "four channels"))
    if name.rpartition(".")[2].lower() not in _EXTENSIONS[form]:
        flaws.append(("misnamed", f"is a {form}"))
    orientation = _orientation(content)
    if orientation != 1:
        flaws.append(("orientation", f"EXIF orientation {orientation}"))
    return flaws


def kind_of(problem: str) -> str:
    """The kind of finding that a problem of `data.scan` is."""
    return problem.removesuffix(" format").replace(" ", "-")


def _explain(problem: str, content: bytes) -> str:
    if problem == "empty":
        return "0 bytes"
    if problem == "truncated":
        return f"the mark of its end is missing after {len(content):,} bytes"
    try:
        with Image.open(io.BytesIO(content)) as image:
            return f"is a {image.format}"
    except UnidentifiedImageError:
        return f"begins with {content[:16]!r}"
    except Exception as error:  # a malformed header can raise anything
        return str(error)


def _orientation(content: bytes) -> int:
    """The orientation in the EXIF data; 1, upright, where there are none that can be read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # malformed EXIF data can raise anything, and matter to nobody
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


# DALI ------------------------------------------------------------------------------------


def decode_with_dali(contents: Sequence[bytes]) -> list[str]:
    """A `Decode`: decodes the whole images on the CPU, as evaluation does."""
    reasons = [""] * len(contents)
    start = 0
    while start < len(contents):
        num_good, reason = _run(contents[start:], _BATCH)
        start += num_good
        if reason:  # one of this batch, or more: DALI does not say which
            for index in range(start, min(start + _BATCH, len(contents))):
                reasons[index] = _run(contents[index : index + 1], 1)[1]
            start += _BATCH
    return reasons


def _run(contents: Sequence[bytes], batch_size: int) -> tuple[int, str]:
    """How many of `contents` are decoded before the first bad batch, and why that one is bad."""
    parts = [contents[i : i + batch_size] for i in range(0, len(contents), batch_size)]
    decoding = Decoding("evaluation", torch.device("cpu"), batch_size, from_paths=False)
    num_good = 0
    try:
        for images in decoded(decoding, (_feed(part) for part in parts)):
            num_good += len(images)
    except DecodeError as error:
        return num_good, str(error)
    return num_good, ""


def _feed(contents: Sequence[bytes]) -> Feed:
    num = len(contents)
    return Feed(
        encoded=[np.frombuffer(content, np.uint8) for content in contents],
        windows=np.tile(np.array([0, 0, _SIDE, _SIDE], np.int32), (num, 1)),
        shapes=np.full((num, 2), _SIDE, np.float32),
        flips=np.zeros(num, np.int32),
        colours=np.ones((num, 3), np.float32),
    )
