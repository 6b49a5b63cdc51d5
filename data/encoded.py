"""The encoded images of a manifest, as DALI takes them: paths that it reads, or bytes from shards.

Shards are read ahead by threads, single images by their byte ranges, from a disk or a store.
"""

import functools
import os
import resource
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data.catalogue import Manifest
from data.files import Folder

T = TypeVar("T")
_UNREADABLE = np.zeros(1, np.uint8)
"""what DALI gets for an image that cannot be read: it fails there, in its turn"""
_THREADS = 8
_REMOTE_THREADS = 32
_AHEAD = 3
"""batches"""


class EncodedImages:
    """Images by their index in a manifest whose files are below `root`."""

    def __init__(self, root: str, manifest: Manifest) -> None:
        self.manifest = manifest
        self.from_paths = not manifest.in_shards
        self._prefix = os.fsencode(root) + b"/"
        self._folder = Folder(root)
        self._open = functools.lru_cache(_most_open_files())(_OpenFile)

    def path(self, image: int) -> NDArray[np.uint8]:
        """The path of an image that is a file, as bytes."""
        return np.frombuffer(self._prefix + self.manifest.names.raw(image), np.uint8)

    def content(self, image: int) -> NDArray[np.uint8]:
        """The bytes of an image; of one that cannot be read, a single zero."""
        try:
            return np.frombuffer(self.read(image) or b"\0", np.uint8)
        except OSError:
            return _UNREADABLE

    def read(self, image: int) -> bytes:
        """The bytes of an image. Raises `OSError`."""
        manifest = self.manifest
        name = manifest.files[int(manifest.file_of[image])]
        start, length = int(manifest.offsets[image]), int(manifest.num_bytes[image])
        if not self._folder.is_local:
            return self._folder.read_range(name, start, length)
        file = self._open(os.fsdecode(self._prefix) + name)
        return os.pread(file.descriptor, length, start)

    def read_anew(self, image: int) -> bytes:
        """The bytes of an image as they are now, of a file whole. Raises `OSError`."""
        if not self.from_paths:
            return self.read(image)
        with open(self.path(image).tobytes(), "rb") as file:
            return file.read()

    def ahead(
        self, plans: Iterator[T], images: Callable[[T], NDArray[np.int64]]
    ) -> Iterator[tuple[T, list[NDArray[np.uint8]]]]:
        """Each plan with the encoded `images` of it, read while earlier ones are worked on."""
        if self.from_paths:
            for plan in plans:
                yield plan, [self.path(image) for image in images(plan).tolist()]
            return
        threads = _THREADS if self._folder.is_local else _REMOTE_THREADS
        pool = ThreadPoolExecutor(threads, thread_name_prefix="tombola-read")
        try:
            waiting: deque[tuple[T, list[Future[NDArray[np.uint8]]]]] = deque()
            for plan in plans:
                reads = [pool.submit(self.content, image) for image in images(plan).tolist()]
                waiting.append((plan, reads))
                if len(waiting) > _AHEAD:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _finished(plan: T, reads: list[Future[NDArray[np.uint8]]]) -> tuple[T, list[NDArray[np.uint8]]]:
    return plan, [read.result() for read in reads]


class _OpenFile:
    """A file descriptor that is closed when nobody holds this any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _most_open_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(soft // 4, 4096)) if soft > 0 else 4096
