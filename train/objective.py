"""The loss: cross-entropy with label smoothing, mixup and cutmix (timm's)."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor

from data.errors import UserError
from data.loader import Batch
from data.order import stream_seed


class Objective:
    """Mean cross-entropy over the global batch.

    How a batch is mixed is a pure function of (seed, step): the same coefficient on every rank
    and after a resume. Images are paired within a rank's share.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.label_smoothing = label_smoothing
        self._seed = seed
        self._mixup: Mixup | None = None
        if mixup or cutmix:
            self._mixup = Mixup(
                mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes
            )

    def mix(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Images and targets: labels `[N] int64`, or probabilities `[N, num_classes]` if mixed.

        Raises `UserError` where a rank's share is odd: timm pairs its images.
        """
        if self._mixup is None:
            return batch.images, batch.labels
        if len(batch.images) % 2:
            raise UserError(
                f"train.mixup and train.cutmix pair images, and a rank's share of the batch is "
                f"{len(batch.images)}: choose data.batch_size as an even multiple of the ranks"
            )
        with _numpy_seeded(stream_seed(self._seed, "mixup", step)):
            images, targets = self._mixup(batch.images, batch.labels)
        return images, targets

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The summed loss: `logits: [N, num_classes] float32`, `targets` as `mix` gives them."""
        mixed = self._mixup is not None
        smoothing = 0.0 if mixed else self.label_smoothing  # timm smooths mixed targets itself
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """timm draws from NumPy's global generator: seeds it for a moment, and puts it back."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
