"""`tombola bench loader`: images/s of the training view against other loaders, in one run."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import UserError
from data.layout import folder_tree
from data.pipeline import default_threads, require_dali
from launch.bench.loaders import SIZE, Open, contenders, prepare
from launch.bench.measure import median_ratio, report, wait_for_device

_NUM_IMAGES = 768
_SHAPES = ((500, 375), (500, 333), (375, 427), (500, 375))
_WARM_BATCHES = 3


def bench_loader(*, root: str | None = None, as_json: bool) -> None:
    """CPU: batches of 64. CUDA: batches of 256, JPEGs decoded there (DALI's `mixed`).

    Every loader has as many threads or workers as the machine has cores, is started anew in each
    round, and is timed from its fourth batch on, when what it had prefetched is used up.
    """
    require_dali()
    cuda = torch.cuda.is_available()
    batch_size, num_batches, rounds = (256, 40, 7) if cuda else (64, 16, 9)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tree = write_images(scratch / "images") if root is None else Path(root)
        num_images = len(folder_tree(str(tree)).splits["train"].entries)
        if num_images < batch_size:
            raise UserError(f"--root {root}: has {num_images} training images, of {batch_size}")
        prepare(tree, scratch)
        seconds = _race(contenders(tree, scratch, batch_size), num_batches, rounds)
    what = "made JPEGs" if root is None else "JPEGs"
    result: dict[str, object] = {
        "work": f"{num_images} {what}, {SIZE} px, batch {batch_size}, {rounds} x {num_batches} "
        f"batches, {default_threads()} threads or workers"
    }
    for name, times in seconds.items():
        result[f"{name}: images/s"] = batch_size * num_batches / statistics.median(times)
    for name, times in list(seconds.items())[1:]:
        result[f"ratio to {name}"] = median_ratio(times, seconds["tombola"])
    report(result, as_json=as_json)


def _race(loaders: dict[str, Open], num_batches: int, rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each loader for that many batches, in turn, the order turned each round."""
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for index in range(rounds):
        turn = list(loaders.items())
        for name, start in reversed(turn) if index % 2 else turn:
            seconds[name].append(_time(start(), num_batches))
    return seconds


def _time(batches: Iterator[Tensor], num_batches: int) -> float:
    for _ in range(_WARM_BATCHES):
        next(batches)
    wait_for_device()
    started = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    wait_for_device()
    return time.perf_counter() - started


def write_images(root: Path) -> Path:
    """A tree of JPEGs like ImageNet's: parts of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for split, num_images in (("train", _NUM_IMAGES), ("val", 2)):
        for index in range(num_images):
            photograph = photographs[index % 2]
            shape = _SHAPES[index // 2 % len(_SHAPES)]
            left = int(rng.integers(0, photograph.width - shape[0] + 1))
            top = int(rng.integers(0, photograph.height - shape[1] + 1))
            folder = root / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            part = photograph.crop((left, top, left + shape[0], top + shape[1]))
            part.save(folder / f"{index:05d}.jpg", quality=90)
    return root
