"""What the header of an image file tells, and whether training can read the file.

DALI 2.4 may crash the whole process on a file that is no image: nothing reaches its decoders that
was not looked at here.
"""

import io
import os
from typing import BinaryIO, NamedTuple

from PIL import Image

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""lower case; what is named otherwise is not taken for an image"""
_DECODED = ("JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP")  # MPO: a JPEG with a preview behind it
_TAIL = 4096
_ORIENTATION = 0x0112

PROBLEMS = (
    "",
    "empty",
    "unreadable",
    "not an image",
    "unsupported format",
    "truncated",
    "too large",
)
"""why a file cannot be trained on; the index is what a manifest holds"""


class Header(NamedTuple):
    """Width and height in pixels as stored, and an index into `PROBLEMS`."""

    width: int
    height: int
    problem: int

    @classmethod
    def bad(cls, problem: str) -> "Header":
        """The header of a file that cannot be used, and why."""
        return cls(0, 0, PROBLEMS.index(problem))


def scan_path(path: str) -> Header:
    """The header of a file on a local disk: never raises for what is in it."""
    try:
        with open(path, "rb") as file:
            return scan(file, os.fstat(file.fileno()).st_size)
    except OSError:
        return Header.bad("unreadable")


def scan_bytes(content: bytes) -> Header:
    """The header of a file in memory: never raises for what is in it."""
    return scan(io.BytesIO(content), len(content))


def scan(file: BinaryIO, num_bytes: int) -> Header:
    """Reads the header, and the end of the file where its format marks it."""
    if num_bytes == 0:
        return Header.bad("empty")
    try:
        with Image.open(file) as image:
            form, (width, height) = image.format, image.size
            if form not in _DECODED:
                return Header.bad("unsupported format")
            if form == "TIFF" and image.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width  # Pillow tells the shape after the rotation
            file.seek(max(0, num_bytes - _TAIL))
            complete = _is_complete(str(form), file.read(_TAIL))
    except Image.DecompressionBombError:
        return Header.bad("too large")
    except OSError as error:  # Pillow's own errors carry no errno, the disk's do
        return Header.bad("not an image" if error.errno is None else "unreadable")
    except Exception:  # a malformed header can raise anything
        return Header.bad("not an image")
    return Header(width, height, 0 if complete else PROBLEMS.index("truncated"))


def _is_complete(form: str, tail: bytes) -> bool:
    if form in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if form == "PNG":
        return b"IEND" in tail
    return True
