"""Writes one shard of a packed data set: in a worker, from a task that says all that goes in."""

import hashlib
import io
import multiprocessing
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from data.catalogue import Manifest
from data.encoded import EncodedImages
from data.errors import UserError
from data.files import Folder
from data.layout import UNFINISHED
from data.scan import PROBLEMS, Header, scan_bytes

_BLOCK = 512
_READ_AHEAD = 64
_THREADS = 16
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


@dataclass(frozen=True)
class PackOptions:
    """How a data set is packed."""

    resize: int | None = None
    """images whose shorter side is longer are re-encoded with this one"""
    quality: int = 90
    """JPEG quality of what is re-encoded"""
    shard_size: int = 2048
    """images per shard"""

    def __post_init__(self) -> None:
        if self.resize is not None and not 16 <= self.resize <= 4096:
            raise UserError(f"--resize {self.resize}: must be from 16 to 4096")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: must be from 1 to 100")
        if self.shard_size < 1:
            raise UserError(f"--shard-size {self.shard_size}: must be at least 1")

    def document(self) -> dict[str, int | None]:
        """What decides the bytes of the shards: no quality where nothing is re-encoded."""
        quality = None if self.resize is None else self.quality
        return {"resize": self.resize, "quality": quality, "shard_size": self.shard_size}


DEFAULTS = PackOptions()


@dataclass(frozen=True)
class ShardTask:
    """The images of a shard in its order, and where it goes."""

    source: str
    images: Manifest
    keys: list[str]
    options: PackOptions
    target: str
    name: str
    scratch: str
    """a local folder for the shard while it is written; on a local target's own disk"""


@dataclass(frozen=True)
class PackedShard:
    """What is in a shard: its digest and size, and the place and shape of each image in it."""

    sha256: str
    num_bytes: int
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    shapes: list[list[int]]

    @classmethod
    def from_document(cls, document: Any, num_images: int) -> "PackedShard":
        """Reads what `vars` gave. Raises `ValueError` for anything else."""
        try:
            shard = cls(**document)
        except TypeError as error:
            raise ValueError(str(error)) from None
        if {len(shard.names), len(shard.offsets), len(shard.sizes), len(shard.shapes)} != {
            num_images
        }:
            raise ValueError(f"is not about {num_images} images")
        return shard


def write_shard(task: ShardTask) -> PackedShard:
    """Writes the shard, and then a note of what is in it, each whole or not at all.

    Raises `UserError` for an image that cannot be used, and `OSError`.
    """
    path = Path(task.scratch) / f"{task.name}.{os.getpid()}"
    target = Folder(task.target)
    try:
        with open(path, "wb") as file:
            shard = _fill(Tar(file), task)
        target.put(task.name, path)
    finally:
        path.unlink(missing_ok=True)
    target.write_json(f"{UNFINISHED}/{task.name}.json", vars(shard))
    return shard


def _fill(tar: "Tar", task: ShardTask) -> PackedShard:
    names, offsets, sizes, shapes = list[str](), list[int](), list[int](), list[list[int]]()
    for row, content in enumerate(_contents(task)):
        _end_with_the_parent()
        content, extension, header = _packed_image(content, task, row)
        names.append(f"{task.keys[row]}.{extension}")
        offsets.append(tar.add(names[-1], content))
        sizes.append(len(content))
        shapes.append([header.width, header.height])
        tar.add(f"{task.keys[row]}.cls", str(task.images.labels[row]).encode())
    tar.close()
    return PackedShard(tar.digest.hexdigest(), tar.num_bytes, names, offsets, sizes, shapes)


def _contents(task: ShardTask) -> Iterator[bytes]:
    """The encoded images of a task, read by threads some way ahead."""
    reader = EncodedImages(task.source, task.images)
    rows = range(len(task.images))
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in rows[::_READ_AHEAD]:
            yield from pool.map(reader.read, rows[start : start + _READ_AHEAD])


def _end_with_the_parent() -> None:
    """Leaves if the command was killed: a shard put later could fall into another pack."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


# Images ----------------------------------------------------------------------------------


def _packed_image(content: bytes, task: ShardTask, row: int) -> tuple[bytes, str, Header]:
    """The bytes of an image as they are packed, their file extension and header."""
    if len(content) != task.images.num_bytes[row]:
        raise _unusable(task, row, "has become shorter since it was listed")
    try:
        content, extension = encoded(content, task.options)
    except MemoryError:
        raise
    except Exception as error:  # a malformed image can raise anything
        raise _unusable(task, row, f"cannot be decoded ({error})") from None
    header = scan_bytes(content)
    if header.problem:
        raise _unusable(task, row, f"has changed, and is {PROBLEMS[header.problem]}")
    return content, extension, header


def _unusable(task: ShardTask, row: int, why: str) -> UserError:
    where = f"{task.source}/{task.images.where(row)}"
    return UserError(f"{where}: {why}; mend or remove it (`tombola data verify` lists all such)")


def encoded(content: bytes, options: PackOptions) -> tuple[bytes, str]:
    """An image file as it is packed, and its extension: verbatim, or a smaller JPEG.

    Pixels are taken as stored, without EXIF's rotation, which is how training reads them; EXIF
    itself is dropped. Raises what Pillow raises for a malformed file.
    """
    with Image.open(io.BytesIO(content)) as image:
        form, short = str(image.format), min(image.size)
        if options.resize is None or short <= options.resize or not _is_jpeg_like(image):
            return content, _EXTENSIONS.get(form, form.lower())
        width, height = (round(side * options.resize / short) for side in image.size)
        pixels = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    pixels.info.clear()  # else a JPEG's comment is written again
    packed = io.BytesIO()
    pixels.save(packed, "JPEG", quality=options.quality)
    return packed.getvalue(), "jpg"


def _is_jpeg_like(image: Image.Image) -> bool:
    """Whether a JPEG can hold the pixels as stored.

    More than 8 bits it cannot; and Pillow turns a TIFF, and no other, as its EXIF says.
    """
    turned = image.format == "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return not turned and image.mode[:1] not in ("I", "F")


# Tar files -------------------------------------------------------------------------------


class Tar:
    """A tar file whose bytes are a function of its members' names and contents alone."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def add(self, name: str, content: bytes) -> int:
        """Appends a file of no time and no owner, and gives the offset of its content."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o444
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(content + bytes(-len(content) % _BLOCK))
        return offset

    def close(self) -> None:
        """Marks the end: two empty blocks, and as many more as make up a record."""
        end = self.num_bytes + 2 * _BLOCK
        self._write(bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self.digest.update(content)
        self.num_bytes += len(content)
