"""The seam between images and training: `Batch`, `Loader`, `EvaluationSet`.

A loader is an endless stream of this rank's shares of the global batches, from a position that
is one integer. The loader here reads images that live on the device; `data.stream` has the one
that decodes files.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from data.augment import Augmenter, placed
from data.errors import UserError
from data.order import SampleOrder, shard


class Batch(NamedTuple):
    """`images: [N, C, H, W] float`, normalised, on the device; `labels: [N] int64`."""

    images: Tensor
    labels: Tensor


class Replacement(NamedTuple):
    """A training image that could not be decoded, and what the batch of `step` showed instead."""

    step: int
    """counted as `TrainState.step` is after that batch"""
    image: str
    by: str
    reason: str


class Loader(Protocol):
    """Training batches from a given step on, without end."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        ...

    @property
    def batch_size(self) -> int:
        """The global batch size, over all ranks."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, int]:
        """The position, as one integer."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on at a position that `state_dict` gave."""
        ...

    @property
    def skips_bad(self) -> bool:
        """Whether images that cannot be decoded are replaced: the same on all ranks."""
        ...

    def replacements(self) -> list[Replacement]:
        """What this rank had to replace in the batches handed out since the last call."""
        ...


class EvaluationSet(Protocol):
    """This rank's share of a data set, each image of which belongs to exactly one rank."""

    @property
    def num_samples(self) -> int:
        """Images of the split, over all ranks."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def undecodable(self) -> list[int]:
        """The numbers of the images of this share that cannot be decoded; decodes them all."""
        ...


def check_shares(batch_size: int, world_size: int) -> None:
    """Raises `UserError` where a rank would have no image in a step."""
    if batch_size < world_size:
        raise UserError(
            f"data.batch_size = {batch_size} is smaller than the {world_size} ranks: each rank "
            "needs at least one image a step"
        )


class Positioned:
    """What loaders over a `SampleOrder` share: where they are is one integer."""

    def __init__(self, order: SampleOrder, rank: int, world_size: int) -> None:
        check_shares(order.batch_size, world_size)
        self.order = order
        self._rank, self._world_size = rank, world_size
        self._position = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.order.steps_per_epoch

    @property
    def batch_size(self) -> int:
        """Images of a global batch."""
        return self.order.batch_size

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on at a position that `state_dict` gave."""
        self._position = state["position"]


class MemoryLoader(Positioned):
    """A `Loader` over images resident on the device, augmented in batches there."""

    def __init__(
        self,
        images: Augmenter,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(SampleOrder(len(labels), batch_size, seed), rank, world_size)
        self._augment, self._labels = images, labels

    def __iter__(self) -> Iterator[Batch]:
        while True:
            epoch, step = divmod(self._position, self.steps_per_epoch)
            samples = self.order.batch(epoch, step, self._rank, self._world_size)
            labels = self._labels[placed(samples, self._labels.device)]
            self._position += 1
            yield Batch(self._augment(samples, seed=self.order.seed, epoch=epoch), labels)

    skips_bad = False

    def replacements(self) -> list[Replacement]:
        """None: all images are there."""
        return []


class MemoryEvaluationSet:
    """An `EvaluationSet` over images resident on the device."""

    def __init__(
        self, images: Tensor, labels: Tensor, *, batch_size: int, rank: int, world_size: int
    ) -> None:
        self.num_samples = len(images)
        self._images, self._labels = images, labels
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        for part in shard(self.num_samples, self._batch_size, self._rank, self._world_size):
            yield Batch(self._images[part], self._labels[part])

    def undecodable(self) -> list[int]:
        """None: all images are there."""
        return []
