"""What a training shows in the place of an image that cannot be decoded."""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data.catalogue import Manifest
from data.errors import RunError


class Replacer:
    """Which image a sample shows: its own, or the next of its class that can be decoded.

    Whether an image is bad depends on its file and, for damage below a window, on the window: a
    pure function of (epoch, sample), which a resume, or another rank, finds out again.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._found: dict[tuple[int, int], dict[int, str]] = {}

    def note(self, epoch: int, sample: int, image: int, reason: str) -> None:
        """In this epoch, `sample` cannot show `image`."""
        self._found.setdefault((epoch, sample), {})[image] = reason

    def images(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The image that each sample of an epoch shows. Raises `RunError` where there is none."""
        if not self._found and not self._manifest.problems[samples].any():
            return samples
        return np.array([self._image(epoch, sample) for sample in samples.tolist()], np.int64)

    def reason(self, epoch: int, sample: int) -> str:
        """Why a sample does not show its own image."""
        found = self._found.get((epoch, sample), {})
        return self._manifest.problem(sample) or found.get(sample, "")

    def _image(self, epoch: int, sample: int) -> int:
        found = self._found.get((epoch, sample), {})
        image = sample
        while self._manifest.problems[image] or image in found:
            image = self._next_of_class(image)
            if image == sample:
                raise RunError(
                    f"no image of the class of {self._manifest.where(sample)} can be decoded; see "
                    "`tombola data verify`"
                )
        return image

    def _next_of_class(self, image: int) -> int:
        order, place = self._by_class
        labels = self._manifest.labels
        following = int(place[image]) + 1
        if following < len(order) and labels[order[following]] == labels[image]:
            return int(order[following])
        return int(order[np.searchsorted(labels[order], labels[image])])

    @cached_property
    def _by_class(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The images sorted by class, and the place of each in that order."""
        order = np.argsort(self._manifest.labels, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return order, place
