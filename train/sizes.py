"""Progressive resizing: the size of the training images as a function of the epoch.

After the recipe of FFCV (Leclerc et al. 2023, 2306.12517): most of a training sees small images,
its end the full size.
"""

import numpy as np

from data.config import DataConfig
from data.errors import UserError
from data.stream import SizeOfEpoch
from train.duration import Duration

_MULTIPLE = 32


def size_of_epoch(config: DataConfig, *, steps_per_epoch: int, total_steps: int) -> SizeOfEpoch:
    """The side of the training images in each epoch, from the points of `data.size`.

    Linear between the points, at the first step of the epoch, rounded to a multiple of 32; before
    the first and after the last point, and between equal ones, exactly theirs.
    """
    sizes = [side for side, _ in config.sizes]
    steps = [Duration.parse(t).steps(steps_per_epoch, total_steps) for _, t in config.sizes]
    if steps != sorted(steps):
        raise UserError(
            f"data.size = {' '.join(config.size)!r}: the points must follow one another"
        )

    def side_of(epoch: int) -> int:
        step = epoch * steps_per_epoch
        reached = sum(after <= step for after in steps)
        neighbours = set(sizes[max(0, reached - 1) : reached + 1])
        if len(neighbours) == 1:
            return neighbours.pop()
        between = float(np.interp(step, steps, sizes))
        return sizes[reached - 1] if step == steps[reached - 1] else _rounded(between)

    return side_of


def _rounded(size: float) -> int:
    return max(_MULTIPLE, round(size / _MULTIPLE) * _MULTIPLE)
