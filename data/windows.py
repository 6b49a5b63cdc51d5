"""Which part of an image is seen, and how large: torchvision's rules, vectorised over a batch."""

import numpy as np
from numpy.typing import NDArray

CROP_TRIES = 10
CROP_DRAWS = 4 * CROP_TRIES
_RATIO = (3 / 4, 4 / 3)


def random_resized_crops(
    draws: NDArray[np.float64], shapes: NDArray[np.int32], *, min_area: float
) -> NDArray[np.int32]:
    """Windows `[N, 4]`, x, y, width and height, by the rule of `RandomResizedCrop`.

    `draws: [N, 40]` in [0, 1): ten tries of area, ratio, x and y; `shapes: [N, 2]`, width and
    height. The first try that fits counts; after ten, the largest centred window of an allowed
    ratio. The area is uniform in [`min_area`, 1] of the image's, the ratio log-uniform in
    [3/4, 4/3] (Szegedy et al. 2015, 1409.4842).
    """
    tries = draws.reshape(len(draws), CROP_TRIES, 4)
    width, height = shapes[:, :1].astype(np.float64), shapes[:, 1:].astype(np.float64)
    area = width * height * (min_area + (1 - min_area) * tries[:, :, 0])
    low, high = np.log(_RATIO)
    ratio = np.exp(low + (high - low) * tries[:, :, 1])
    wide, tall = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = (np.arange(len(draws)), fits.argmax(axis=1))
    wide, tall = wide[first], tall[first]
    left = np.floor(tries[:, :, 2][first] * (width[:, 0] - wide + 1))
    top = np.floor(tries[:, :, 3][first] * (height[:, 0] - tall + 1))
    windows = np.stack([left, top, wide, tall], axis=1).astype(np.int32)
    return np.where(fits.any(axis=1)[:, None], windows, _widest(shapes))


def _widest(shapes: NDArray[np.int32]) -> NDArray[np.int32]:
    width, height = shapes[:, 0], shapes[:, 1]
    wide = np.minimum(width, np.rint(height * _RATIO[1])).astype(np.int32)
    tall = np.minimum(height, np.rint(width / _RATIO[0])).astype(np.int32)
    return np.stack([(width - wide) // 2, (height - tall) // 2, wide, tall], axis=1)


def central_squares(shapes: NDArray[np.int32], share: float) -> NDArray[np.int32]:
    """The centred square windows `[N, 4]` whose side is `share` of the shorter side."""
    side = np.maximum(1, np.rint(shapes.min(axis=1) * share)).astype(np.int32)
    corner = (shapes - side[:, None]) // 2
    return np.stack([corner[:, 0], corner[:, 1], side, side], axis=1)


def resized_centres(
    shapes: NDArray[np.int32], *, resize: int, size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """`Resize(resize)` and `CenterCrop(size)`: new shapes `[N, 2]`, and corners `[N, 2]` (x, y).

    The shorter side becomes `resize`, the longer one is cut down to a whole number, as torchvision
    does.
    """
    shorter = shapes.min(axis=1, keepdims=True).astype(np.int64)
    resized = np.where(shapes == shorter, resize, resize * shapes.astype(np.int64) // shorter)
    corners = np.rint((resized - size) / 2)
    return resized.astype(np.int32), corners.astype(np.int32)
