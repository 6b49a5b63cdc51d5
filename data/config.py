"""The `data` section of a configuration."""

import re
from dataclasses import dataclass
from typing import Literal

from data.arrays import READERS
from data.errors import did_you_mean

ON_DISK = ("imagenet", "folder", "webdataset")
"""read and decoded as they come; what has a reader is held on the device as a whole"""
_FILES_ONLY = ("size", "eval_size", "eval_resize", "color_jitter")
_POINT = re.compile(r"(\d+)(?:@(\d+(?:\.\d+)?(?:ep|%)|\d+it))?")
"""a size, and the `train.duration` after which it holds"""


def sources() -> tuple[str, ...]:
    """The kinds of data sets there are."""
    return (*READERS, *ON_DISK)


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how large a batch is."""

    source: str = "digits"
    """digits, cifar10, cifar100, idx (MNIST-like), imagenet, folder (of classes), webdataset; or
    KIND:PATH, which takes the place of root"""
    root: str = "~/.cache/tombola"
    """folder of the data set, or URL of its shards (digits needs none)"""
    batch_size: int = 128
    """images per optimizer step over all ranks: the same on 1 GPU and on 64"""
    eval_batch_size: int = 1024
    """images per evaluation batch and rank; image files take at most 256"""
    augment: bool = True
    """random crops or shifts, and flips where they make sense, of the training images"""
    size: tuple[str, ...] = ()
    """image files: side of the training images, 224 by default; a schedule is a list of points as
    160 160@65ep 192@76ep, linear between them, set at each epoch to a multiple of 32"""
    eval_size: int | None = None
    """image files: side of the evaluation's centre crop; by default the last training size"""
    eval_resize: int | None = None
    """image files: the shorter side before that crop; by default 8/7 of it, 256 for 224"""
    min_crop: float = 0.08
    """image files: least share of an image's area that a random crop shows"""
    color_jitter: float = 0.0
    """image files: brightness, contrast and saturation vary by up to this share"""
    on_bad: Literal["error", "skip"] = "error"
    """a training image that cannot be decoded ends the run, or is replaced by the next of its
    class and recorded"""
    manifest: str | None = None
    """image files: folder or URL that keeps what was read of their headers, for several runs;
    by default the run's folder"""
    decoder: Literal["auto", "cpu", "gpu"] = "auto"
    """image files: what decodes JPEGs; auto is the GPU where there is one"""
    threads: int | None = None
    """image files: decoding threads per rank; by default the rank's share of the cores"""
    prefetch: int | None = None
    """image files: batches decoded ahead; by default 2, or 3 from four threads on"""

    def __post_init__(self) -> None:
        if self.kind not in sources():
            known = ", ".join(sources())
            near = did_you_mean(self.kind, sources())
            raise ValueError(f"source = {self.source!r} is not known{near} (known: {known})")
        for name in ("batch_size", "eval_batch_size", "eval_size", "eval_resize", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.prefetch is not None and self.prefetch < 2:
            raise ValueError(f"prefetch = {self.prefetch}: must be at least 2, or nothing overlaps")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"min_crop = {self.min_crop}: must be in (0, 1]")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter = {self.color_jitter}: must be in [0, 1]")
        self._check_sizes()

    def _check_sizes(self) -> None:
        for index, point in enumerate(self.size):
            match = _POINT.fullmatch(point)
            if match is None or not 16 <= int(match[1]) <= 4096 or (index and match[2] is None):
                raise ValueError(
                    f"size = {' '.join(self.size)!r}: write 224, or a schedule as "
                    "160 160@65ep 192@76ep, with sizes from 16 to 4096"
                )
        if self.kind in READERS:
            for name in _FILES_ONLY:
                if getattr(self, name):
                    raise ValueError(
                        f"{name} = {getattr(self, name)}: source {self.kind!r} has images of one "
                        "size in memory; only image files take it"
                    )
        elif self.evaluation_resize < self.evaluation_size:
            raise ValueError(
                f"eval_resize = {self.evaluation_resize}: must be at least eval_size, "
                f"{self.evaluation_size}"
            )

    @property
    def kind(self) -> str:
        """Which source, without its place."""
        return self.source.partition(":")[0]

    @property
    def place(self) -> str:
        """Folder or URL of the source."""
        return self.source.partition(":")[2] or self.root

    @property
    def sizes(self) -> tuple[tuple[int, str], ...]:
        """The points of the size's schedule: the side, and the duration after which it holds."""
        matches = [_POINT.fullmatch(point) for point in self.size or ("224",)]
        return tuple((int(match[1]), match[2] or "0it") for match in matches if match)

    @property
    def evaluation_size(self) -> int:
        """The side of the evaluation's centre crop."""
        return self.eval_size or self.sizes[-1][0]

    @property
    def evaluation_resize(self) -> int:
        """The shorter side of an image before its centre is cropped."""
        return self.eval_resize or round(self.evaluation_size * 256 / 224)
