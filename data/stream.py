"""Image files as a `Loader` and as an `EvaluationSet`: what is decoded next, as numbers.

What a batch shows is a pure function of (seed, epoch, sample): its samples by `SampleOrder`, each
one's window, flip and colours by `sample_uniforms`. So the position of a loader is one integer,
what was prefetched can be dropped, and the number of ranks changes nothing.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment import placed
from data.blame import Trials, undecodable
from data.encoded import EncodedImages
from data.errors import RunError
from data.loader import Batch, Positioned, Replacement
from data.order import SampleOrder, sample_uniforms, shard
from data.pipeline import DecodeError, Decoding, Feed, Feeds, decoded
from data.replacing import Replacer
from data.windows import CROP_DRAWS, central_squares, random_resized_crops, resized_centres

_NUM_DRAWS = 48  # 40 of the crop, the flip, three of colour: fixed, so that options share them
_FLIP, _COLOUR = CROP_DRAWS, slice(CROP_DRAWS + 1, CROP_DRAWS + 4)
_UNCROPPED = 0.875
SizeOfEpoch = Callable[[int], int]


@dataclass(frozen=True)
class TrainingView:
    """How training images are varied."""

    augment: bool = True
    min_area: float = 0.08
    color_jitter: float = 0.0


class _Plan(NamedTuple):
    """One batch: the samples in their places, and the image that each of them shows."""

    position: int
    epoch: int
    samples: NDArray[np.int64]
    images: NDArray[np.int64]


class FileLoader(Positioned):
    """A `Loader` that decodes image files with DALI."""

    def __init__(
        self,
        encoded: EncodedImages,
        decoding: Decoding,
        view: TrainingView,
        *,
        order: SampleOrder,
        size_of_epoch: SizeOfEpoch,
        dtype: torch.dtype = torch.float32,
        on_bad: Literal["error", "skip"] = "error",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(order, rank, world_size)
        self._encoded, self._view, self._size_of_epoch = encoded, view, size_of_epoch
        self._decoding = replace(decoding, batch_size=-(-order.batch_size // world_size))
        self._dtype, self.skips_bad = dtype, on_bad == "skip"
        self._replacer = Replacer(encoded.manifest)
        self._replaced: list[Replacement] = []
        self._trials = Trials()

    def __iter__(self) -> Iterator[Batch]:
        while True:  # a new pipeline, after a bad image or another position
            drawn: deque[_Plan] = deque()
            try:
                for images in decoded(self._decoding, self._feeds_of(self._plans(drawn))):
                    plan = drawn.popleft()
                    if plan.position != self._position:
                        break
                    self._position += 1
                    self._replaced += self._replaced_in(plan)
                    yield Batch(images.to(self._dtype), self._labels(plan, images.device))
            except DecodeError as error:
                self._find_bad(drawn, error)

    def replacements(self) -> list[Replacement]:
        """What this rank had to replace in the batches handed out since the last call."""
        found, self._replaced = self._replaced, []
        return found

    def _replaced_in(self, plan: _Plan) -> list[Replacement]:
        where = self._encoded.manifest.where
        return [
            Replacement(
                plan.position + 1,
                where(sample),
                where(image),
                self._replacer.reason(plan.epoch, sample),
            )
            for sample, image in zip(plan.samples.tolist(), plan.images.tolist(), strict=True)
            if sample != image
        ]

    # What comes next ---------------------------------------------------------------------

    def _feeds_of(self, plans: Iterator[_Plan]) -> Feeds:
        for plan, encoded in self._encoded.ahead(plans, lambda plan: plan.images):
            yield self._feed(plan, encoded)

    def _plans(self, drawn: deque[_Plan]) -> Iterator[_Plan]:
        """The batches from the position on; each that is drawn is added to `drawn`."""
        position = self._position
        while True:
            epoch, step = divmod(position, self.steps_per_epoch)
            samples = self.order.batch(epoch, step, self._rank, self._world_size)
            plan = _Plan(position, epoch, samples, self._replacer.images(epoch, samples))
            drawn.append(plan)
            yield plan
            position += 1

    def _feed(self, plan: _Plan, encoded: list[NDArray[np.uint8]]) -> Feed:
        num, shapes = len(plan.samples), self._encoded.manifest.shapes[plan.images]
        size = self._size_of_epoch(plan.epoch)
        draws = sample_uniforms(self.order.seed, plan.epoch, plan.samples, _NUM_DRAWS)
        if self._view.augment:
            windows = random_resized_crops(
                draws[:, :CROP_DRAWS], shapes, min_area=self._view.min_area
            )
            flips = draws[:, _FLIP] < 0.5
        else:
            windows, flips = central_squares(shapes, _UNCROPPED), np.zeros(num, np.bool_)
        colours = 1 + self._view.color_jitter * (2 * draws[:, _COLOUR] - 1)
        return Feed(
            encoded=encoded,
            windows=windows,
            shapes=np.full((num, 2), size, np.float32),
            flips=flips.astype(np.int32),
            colours=colours.astype(np.float32),
        )

    def _labels(self, plan: _Plan, device: torch.device) -> Tensor:
        return placed(self._encoded.manifest.labels[plan.samples], device)

    # What cannot be decoded --------------------------------------------------------------

    def _find_bad(self, drawn: deque[_Plan], error: DecodeError) -> None:
        """Finds which images of the next batches DALI cannot decode, one by one.

        Raises `RunError` naming the first, unless they may be skipped; then they are noted. What
        cannot even be read is never skipped: it may be there again in a minute. Where nothing is
        found, a reading has failed, and the batch gets another trial.
        """
        for plan in drawn:
            ones = [self._part(plan, index) for index in range(len(plan.images))]
            bad = list(undecodable(self._encoded, self._decoding, ones, _images_of, self._feed))
            for (_, epoch, (sample,), (image,)), reason in bad:
                if not self.skips_bad:
                    raise RunError(
                        f"cannot decode {self._encoded.manifest.where(int(image))}: {reason} "
                        f"(epoch {epoch}, step {plan.position}); find all such files with "
                        "`tombola data verify`, or go on without them with --data.on-bad skip"
                    )
                self._replacer.note(epoch, int(sample), int(image), reason)
            if bad:
                return
        self._trials.failed(self._position, error)

    @staticmethod
    def _part(plan: _Plan, index: int) -> _Plan:
        """The plan of one of a batch's images alone."""
        one = slice(index, index + 1)
        return plan._replace(samples=plan.samples[one], images=plan.images[one])


def _images_of(plan: _Plan) -> NDArray[np.int64]:
    return plan.images


class FileEvaluationSet:
    """An `EvaluationSet` that decodes image files: shorter side to `resize`, centre of `size`.

    Of the manifest's images it shows all, or those that `images` numbers. It never leaves one out:
    an accuracy over fewer images is another measure.
    """

    def __init__(
        self,
        encoded: EncodedImages,
        decoding: Decoding,
        *,
        images: NDArray[np.int64] | None = None,
        resize: int,
        size: int,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._images = np.arange(len(encoded.manifest)) if images is None else images
        self.num_samples = len(self._images)
        self._encoded, self._decoding, self._dtype = encoded, decoding, dtype
        self._resize, self._size = resize, size
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        labels = self._encoded.manifest.labels
        done, trials = 0, Trials()
        while True:  # a new pipeline, after a reading that failed
            drawn: deque[NDArray[np.int64]] = deque()
            try:
                for images in decoded(self._decoding, self._feeds_of(self._parts(done, drawn))):
                    part = drawn.popleft()
                    done += 1
                    yield Batch(images.to(self._dtype), placed(labels[part], images.device))
                return
            except DecodeError as error:
                self._refuse_bad(drawn)
                trials.failed(done, error)

    def undecodable(self) -> list[int]:
        """The manifest's numbers of this rank's images that cannot be decoded.

        Decodes each of them once. Raises `RunError` where a reading fails again and again.
        """
        found: list[int] = []
        left, trials = list(self._shares()), Trials()
        while left:
            drawn: deque[NDArray[np.int64]] = deque()
            num_left = len(left)
            try:
                for _ in decoded(self._decoding, self._feeds_of(_noted(left, drawn))):
                    drawn.popleft()
                    num_left -= 1
                return found
            except DecodeError as error:
                bad = [image for image, _ in self._bad_of(drawn)]
                if not bad:
                    trials.failed(num_left, error)
                found += bad
                rest = (part[~np.isin(part, bad)] for part in left[len(left) - num_left :])
                left = [part for part in rest if len(part)]
        return found

    def _shares(self) -> Iterator[NDArray[np.int64]]:
        """This rank's batches."""
        batch_size = self._decoding.batch_size
        for part in shard(self.num_samples, batch_size, self._rank, self._world_size):
            yield self._images[part]

    def _parts(self, first: int, drawn: deque[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
        """This rank's batches from the `first` on; each that is drawn is added to `drawn`."""
        return _noted(islice(self._shares(), first, None), drawn)

    def _feeds_of(self, parts: Iterator[NDArray[np.int64]]) -> Feeds:
        for part, encoded in self._encoded.ahead(parts, lambda part: part):
            yield self._feed(part, encoded)

    def _feed(self, part: NDArray[np.int64], encoded: list[NDArray[np.uint8]]) -> Feed:
        shapes, corners = resized_centres(
            self._encoded.manifest.shapes[part], resize=self._resize, size=self._size
        )
        extent = np.full_like(corners, self._size)
        return Feed(
            encoded=encoded,
            windows=np.concatenate([corners, extent], axis=1),
            shapes=shapes[:, ::-1].astype(np.float32),
            flips=np.zeros(len(part), np.int32),
            colours=np.ones((len(part), 3), np.float32),
        )

    def _refuse_bad(self, drawn: deque[NDArray[np.int64]]) -> None:
        """Raises `RunError` naming the first image that cannot be decoded, if there is one."""
        for image, reason in self._bad_of(drawn):
            raise RunError(
                f"cannot decode {self._encoded.manifest.where(image)}, of the evaluated images: "
                f"{reason}; mend or remove the file: an evaluation leaves no image out"
            )

    def _bad_of(self, drawn: deque[NDArray[np.int64]]) -> Iterator[tuple[int, str]]:
        """The images of these batches that cannot be decoded, and why."""
        ones = [np.array([image]) for part in drawn for image in part.tolist()]
        found = undecodable(self._encoded, self._decoding, ones, lambda one: one, self._feed)
        return ((int(image), reason) for (image,), reason in found)


def _noted(
    parts: Iterable[NDArray[np.int64]], drawn: deque[NDArray[np.int64]]
) -> Iterator[NDArray[np.int64]]:
    """The parts as they are; each that is drawn is added to `drawn`."""
    for part in parts:
        drawn.append(part)
        yield part
