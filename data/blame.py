"""Which images are to blame for a batch that cannot be decoded: DALI does not say.

Reading and decoding are kept apart: an image is called bad only for bytes that were read, so a
store that fails now and then never costs an image.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data.encoded import EncodedImages
from data.errors import RunError
from data.pipeline import DecodeError, Decoding, Feed, decoded
from data.scan import PROBLEMS, scan_bytes

T = TypeVar("T")
_READ_TRIALS = 2
_BATCH_TRIALS = 3
_THREADS = 8


def undecodable(
    encoded: EncodedImages,
    decoding: Decoding,
    ones: Sequence[T],
    images_of: Callable[[T], NDArray[np.int64]],
    feed: Callable[[T, list[NDArray[np.uint8]]], Feed],
) -> Iterator[tuple[T, str]]:
    """Those of single images that DALI cannot decode, each with what is wrong with it.

    `images_of` gives the one image of each of `ones`, `feed` what DALI takes for it. Raises
    `RunError` naming an image that cannot be read.
    """
    decoding = replace(decoding, from_paths=False)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="tombola-blame") as pool:
        contents = list(pool.map(lambda one: _read(encoded, int(images_of(one)[0])), ones))

    done = 0
    while done < len(ones):
        remaining = zip(ones[done:], contents[done:], strict=True)
        feeds = (feed(one, [_as_array(content)]) for one, content in remaining)
        try:
            for _ in decoded(decoding, feeds):
                done += 1
        except DecodeError:
            yield ones[done], PROBLEMS[scan_bytes(contents[done]).problem] or "damaged data"
            done += 1


class Trials:
    """How often the batch at a position failed although each of its images can be decoded."""

    def __init__(self) -> None:
        self._position, self._num = -1, 0

    def failed(self, position: int, error: DecodeError) -> None:
        """Notes a failure: a reading that failed, most likely. Raises `RunError` at the third."""
        self._num = self._num + 1 if position == self._position else 1
        self._position = position
        if self._num == _BATCH_TRIALS:
            raise RunError(f"a batch cannot be decoded, though each of its images can: {error}")


def _as_array(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content or b"\0", np.uint8)


def _read(encoded: EncodedImages, image: int) -> bytes:
    """The bytes of an image as they are now. Raises `RunError` if it cannot be read."""
    for _ in range(_READ_TRIALS):
        try:
            return encoded.read_anew(image)
        except OSError as error:
            failure = error
    raise RunError(
        f"cannot read {encoded.manifest.where(image)}: {failure.strerror or failure}; once it can "
        "be read, the same command goes on from what was saved"
    )
