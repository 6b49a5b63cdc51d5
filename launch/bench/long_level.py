"""What a level of ImageNet's length takes, from parts of ResNet-50's that were measured.

A level of that length is days of a CPU: so IMP itself runs for a few steps on ResNet-50 with images
of ImageNet's shape, and each part is multiplied by how often it comes in 90 epochs.
"""

import contextlib
import io
import tempfile
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch

from data.arrays import READERS, ImageArrays, Split
from data.augment import Augmentation, Normalisation
from data.pipeline import MEAN, STD
from launch.bench import spans
from launch.config import RunConfig, parse_document
from launch.run import run_config
from train.checkpoint import CheckpointConfig
from train.duration import Duration
from train.metrics import LogConfig
from train.settings import TrainConfig

_TRAIN_IMAGES, _HELD_OUT_IMAGES, _EPOCHS = 1_281_167, 50_000, 90
_UNITS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))


@dataclass(frozen=True)
class Parts:
    """Seconds that were measured."""

    batch_size: int
    step: float
    """a training step, waiting for its images included"""
    image: float
    """evaluating one image"""
    save: float
    """that a save stops the training"""
    record: float
    """writing down a loss or an evaluation"""
    once: dict[str, float]
    """what comes once in a level"""


@dataclass(frozen=True)
class Product:
    """A part, and how often it comes."""

    what: str
    counts: tuple[tuple[int, str], ...]
    """factors, each with its unit"""
    each: float
    """seconds"""

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return float(np.prod([count for count, _ in self.counts])) * self.each

    def told(self, total: float) -> str:
        """The product written out, with its share of `total` seconds."""
        factors = [f"{count:,} {unit}".rstrip() for count, unit in self.counts]
        product = " x ".join([*factors, duration(self.each)])
        equals = f" = {duration(self.seconds)}" if factors else ""
        return f"{product}{equals} = {self.seconds / total:.3%}"


def extrapolated(parts: Parts) -> list[Product]:
    """A level of 90 epochs of ImageNet as the defaults have it, the training first.

    The held-out images are evaluated every `train.evaluate` and at the end; the state is saved
    every `checkpoint.minutes` of training, and a loss recorded every `log.every` steps.
    """
    steps_per_epoch = _TRAIN_IMAGES // parts.batch_size
    steps = _EPOCHS * steps_per_epoch
    every = Duration.parse(TrainConfig.evaluate or "1ep").steps(steps_per_epoch, steps)
    evaluations = -(-steps // every)
    saves = int(steps * parts.step / (60 * CheckpointConfig.minutes))
    records = steps // LogConfig.every + evaluations
    epochs = ((_EPOCHS, "epochs"), (steps_per_epoch, "steps"))
    return [
        Product(spans.TRAINING, epochs, parts.step),
        Product(spans.EVALUATION, ((evaluations, ""), (_HELD_OUT_IMAGES, "images")), parts.image),
        Product(spans.SAVING, ((saves, "saves"),), parts.save),
        Product(spans.RECORDING, ((records, "records"),), parts.record),
        *(Product(what, (), seconds) for what, seconds in parts.once.items()),
    ]


def share_beside_training(products: list[Product]) -> float:
    """Of the level's time, all but the training steps."""
    return sum(p.seconds for p in products[1:]) / sum(p.seconds for p in products)


def told(products: list[Product]) -> dict[str, str]:
    """Every product, and their sum."""
    total = sum(product.seconds for product in products)
    return {**{p.what: p.told(total) for p in products}, "the level": duration(total)}


def duration(seconds: float) -> str:
    """In the largest unit of which it is one at least."""
    size, unit = next((one for one in _UNITS if seconds >= one[0]), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


@dataclass(frozen=True)
class Short:
    """How little of ResNet-50's training is measured."""

    batch_size: int
    num_steps: int
    """of the dense level; a pruned one has one less"""
    num_evaluated: int
    """images"""
    model: str = "resnet50"
    size: int = 224
    """pixels"""

    @classmethod
    def here(cls) -> "Short":
        """What takes half a minute on two cores, or on a GPU."""
        return cls(256, 40, 1024) if torch.cuda.is_available() else cls(16, 3, 32)

    def __str__(self) -> str:
        kind = "bf16, channels_last" if torch.cuda.is_available() else "fp32"
        return f"{self.model}, {self.size} px, batch {self.batch_size}, {kind}"


def measure_parts(short: Short) -> Parts:
    """Trains a dense network and two pruned ones for a few steps; the pruned ones' mean parts."""
    images = {"digits": lambda place: _noise(short)}
    quiet = contextlib.redirect_stdout(io.StringIO())
    with spans.watched() as levels, mock.patch.dict(READERS, images), quiet:
        with tempfile.TemporaryDirectory() as folder:
            run_config(_config(short), root=folder)
    parts = spans.mean_level(levels[1:]).parts
    in_steps = parts[spans.TRAINING] + parts[spans.DATA]
    counted = (spans.TRAINING, spans.DATA, spans.EVALUATION, spans.SAVING, spans.RECORDING)
    return Parts(
        short.batch_size,
        step=in_steps / (short.num_steps - 1),
        image=parts[spans.EVALUATION] / short.num_evaluated,
        save=parts[spans.SAVING],
        record=parts[spans.RECORDING] / 2,  # the last loss, and the evaluation at the end
        once={what: seconds for what, seconds in parts.items() if what not in counted},
    )


def _config(short: Short) -> RunConfig:
    """IMP, in whose levels there is one evaluation, one save and one record of the loss."""
    cuda = torch.cuda.is_available()
    document = {
        "name": "long-level",
        "data": {"source": "digits", "batch_size": short.batch_size, "augment": False},
        "model": {"name": short.model},
        "train": {
            "total": f"{short.num_steps}it",
            "evaluate": "1000ep",
            "precision": "bf16" if cuda else "fp32",
            "channels_last": cuda,
        },
        "log": {"every": 1000},
        "stages": [{"name": "imp", "recipe": "imp", "rounds": 2, "rewind": "1it"}],
    }
    return parse_document(document, "bench imp")


def _noise(short: Short) -> ImageArrays:
    """Images of ImageNet's shape and number of classes, two batches to train on."""
    generator = np.random.default_rng(0)

    def split(num: int) -> Split:
        shape = (num, 3, short.size, short.size)
        images = generator.integers(0, 256, shape, dtype=np.uint8)
        return Split(images, generator.integers(0, 1000, num))

    return ImageArrays(
        train=split(2 * short.batch_size),
        validation=None,
        test=split(short.num_evaluated),
        normalisation=Normalisation(MEAN, STD),
        augmentation=Augmentation(),
        classes=tuple(map(str, range(1000))),
    )
