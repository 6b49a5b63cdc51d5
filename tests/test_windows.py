"""Which part of an image is seen: torchvision's rules, exactly and in distribution."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop, Resize
from torchvision.transforms import functional as vision

from data.order import sample_uniforms
from data.windows import (
    CROP_DRAWS,
    CROP_TRIES,
    central_squares,
    random_resized_crops,
    resized_centres,
)

LARGEST_DRAW = 1 - 2.0**-53
SIDES = st.integers(1, 3000)
DRAWS = st.lists(
    st.floats(0, LARGEST_DRAW) | st.sampled_from([0.0, 0.5, LARGEST_DRAW]),
    min_size=CROP_DRAWS,
    max_size=CROP_DRAWS,
)

Window = tuple[int, int, int, int]


def shape_of(width: int, height: int) -> NDArray[np.int32]:
    """The shapes of one image."""
    return np.array([[width, height]], np.int32)


def crop_by_loop(draws: list[float], width: int, height: int, min_area: float) -> Window:
    """`RandomResizedCrop.get_params`, line by line, with `draws` for its random numbers."""
    for first in range(0, CROP_DRAWS, 4):
        for_area, for_ratio, for_x, for_y = draws[first : first + 4]
        area = height * width * (min_area + (1.0 - min_area) * for_area)
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * for_ratio)
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            x = math.floor(for_x * (width - wide + 1))
            y = math.floor(for_y * (height - tall + 1))
            return x, y, wide, tall
    wide, tall = width, height
    if width / height < 3 / 4:
        tall = round(width / (3 / 4))
    elif width / height > 4 / 3:
        wide = round(height * (4 / 3))
    return (width - wide) // 2, (height - tall) // 2, wide, tall


# ---- random crops: the rule


@given(draws=DRAWS, width=SIDES, height=SIDES, min_area=st.sampled_from([0.08, 0.35, 1.0]))
@settings(max_examples=300)
def test_a_crop_follows_torchvisions_rule_and_lies_inside_the_image(
    draws: list[float], width: int, height: int, min_area: float
) -> None:
    """For any draws and shape, the largest draw included."""
    found = random_resized_crops(np.array([draws]), shape_of(width, height), min_area=min_area)
    assert found.dtype == np.int32
    x, y, wide, tall = found[0].tolist()
    assert (x, y, wide, tall) == crop_by_loop(draws, width, height, min_area)
    assert 0 <= x < x + wide <= width
    assert 0 <= y < y + tall <= height


def test_the_images_of_a_batch_do_not_mix() -> None:
    """Each of 500 images of different shapes gets the window that it gets alone."""
    rng = np.random.default_rng(0)
    shapes = rng.integers(1, 700, (500, 2)).astype(np.int32)
    draws = rng.random((500, CROP_DRAWS))
    found = random_resized_crops(draws, shapes, min_area=0.08)
    expected = [
        crop_by_loop(draw.tolist(), *shape.tolist(), 0.08)
        for draw, shape in zip(draws, shapes, strict=True)
    ]
    assert list(map(tuple, found.tolist())) == expected


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((1, 1000), (0, 499, 1, 1)),
        ((1000, 1), (499, 0, 1, 1)),
        ((30, 1000), (0, 480, 30, 40)),
        ((1000, 30), (480, 0, 40, 30)),
    ],
)
def test_where_no_try_fits_the_widest_centred_window_is_taken(
    shape: tuple[int, int], window: Window
) -> None:
    """All tries ask for the whole area, at a ratio of 1, which such thin images do not have."""
    draws = np.tile([LARGEST_DRAW, 0.5, 0.9, 0.9], (1, CROP_TRIES))
    assert random_resized_crops(draws, shape_of(*shape), min_area=0.08).tolist() == [list(window)]
    torch.manual_seed(0)  # torchvision, where it too must fall back
    whole = RandomResizedCrop.get_params(torch.zeros(3, *shape[::-1]), [1.0, 1.0], [0.75, 4 / 3])
    assert (whole[1], whole[0], whole[3], whole[2]) == window


@pytest.mark.parametrize("fitting", range(CROP_TRIES))
def test_the_first_try_that_fits_counts(fitting: int) -> None:
    """Of a 100x20 image: the tries before it ask for all of the area, those after for half."""
    tries = np.tile([LARGEST_DRAW, 0.5, 0.0, 0.0], (CROP_TRIES, 1))
    tries[fitting:] = 0.2, 0.5, 0.5, 0.5
    tries[fitting] = 0.0, 0.5, 0.0, LARGEST_DRAW
    # 160 of the 2,000 pixels, a square of 13; the largest draw is the last row: 20 - 13
    found = random_resized_crops(tries.reshape(1, -1), shape_of(100, 20), min_area=0.08)
    assert found.tolist() == [[0, 7, 13, 13]]


# ---- random crops: their distribution

SAMPLES = 20_000
WIDTH, HEIGHT = 500, 375
NAMES = ("share of the area", "log of the ratio", "place in x", "place in y")
BOUND = 0.0195
"""on the Kolmogorov-Smirnov distance of two samples of 20,000: passed by chance once in 1,000"""


def described(windows: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[N, 4]`, by `NAMES`, of windows x, y, width, height."""
    x, y, wide, tall = windows.T
    room_x, room_y = np.maximum(WIDTH - wide, 1), np.maximum(HEIGHT - tall, 1)
    return np.stack(
        [wide * tall / (WIDTH * HEIGHT), np.log(wide / tall), x / room_x, y / room_y], axis=1
    )


def ours(**options: float) -> NDArray[np.float64]:
    """20,000 windows of the rule here."""
    draws = sample_uniforms(0, 0, np.arange(SAMPLES), CROP_DRAWS)
    shapes = np.repeat(shape_of(WIDTH, HEIGHT), SAMPLES, axis=0)
    return random_resized_crops(draws, shapes, **{"min_area": 0.08, **options}).astype(float)


def distances(windows: NDArray[np.float64], reference: NDArray[np.float64]) -> dict[str, float]:
    """The Kolmogorov-Smirnov distance to torchvision's windows in each of `NAMES`."""
    return {
        name: float(ks_2samp(one, other).statistic)
        for name, one, other in zip(
            NAMES, described(windows).T, described(reference).T, strict=True
        )
    }


@pytest.fixture(scope="module")
def reference() -> NDArray[np.float64]:
    """20,000 windows of torchvision's, as x, y, width, height."""
    image = torch.empty(3, HEIGHT, WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = [
            RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(SAMPLES)
        ]
    top, left, tall, wide = np.array(found, np.float64).T
    return np.stack([left, top, wide, tall], axis=1)


def test_crops_are_distributed_as_torchvisions(reference: NDArray[np.float64]) -> None:
    """Area, ratio and place, each by a Kolmogorov-Smirnov test at 0.001."""
    found = distances(ours(), reference)
    assert max(found.values()) < BOUND, found


def test_area_ratio_and_place_are_as_independent_as_torchvisions(
    reference: NDArray[np.float64],
) -> None:
    """All pairs correlate alike, within 0.04: four standard errors of the difference."""
    mine, theirs = (np.corrcoef(described(windows).T) for windows in (ours(), reference))
    assert np.abs(mine - theirs).max() < 0.04


def other_ratio(windows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ratios in a range that is a tenth wider."""
    factor = np.sqrt(np.exp(0.1 * np.log(windows[:, 2] / windows[:, 3])))
    wide, tall = np.minimum(windows[:, 2] * factor, WIDTH), windows[:, 3] / factor
    return np.stack([windows[:, 0], windows[:, 1], wide, np.minimum(tall, HEIGHT)], axis=1)


def never_at_the_end(windows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places in the first 95 % of the room to the right."""
    return windows * [0.95, 1, 1, 1]


def towards_the_middle(windows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places a tenth nearer to the centre, up and down."""
    room = HEIGHT - windows[:, 3]
    moved = windows.copy()
    moved[:, 1] = room / 2 + 0.9 * (windows[:, 1] - room / 2)
    return moved


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (other_ratio, "log of the ratio"),
        (never_at_the_end, "place in x"),
        (towards_the_middle, "place in y"),
    ],
)
def test_the_bound_tells_another_rule_apart(
    reference: NDArray[np.float64],
    wrong: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    name: str,
) -> None:
    """Slightly wrong ratios and places are rejected, and by the measure that they concern."""
    assert distances(wrong(ours()), reference)[name] > BOUND


@pytest.mark.parametrize("min_area", [0.05, 0.12, 0.2])
def test_the_bound_tells_another_least_area_apart(
    reference: NDArray[np.float64], min_area: float
) -> None:
    """0.05 or 0.12 instead of 0.08 are rejected."""
    assert distances(ours(min_area=min_area), reference)["share of the area"] > BOUND


# ---- central squares


def test_a_central_square_is_a_share_of_the_shorter_side() -> None:
    """By hand, for wide, tall, square and tiny images."""
    shapes = np.array([[100, 80], [80, 100], [64, 64], [1, 5], [9, 8]], np.int32)
    assert central_squares(shapes, 0.875).tolist() == [
        [15, 5, 70, 70],
        [5, 15, 70, 70],
        [4, 4, 56, 56],
        [0, 2, 1, 1],
        [1, 0, 7, 7],
    ]


@given(width=SIDES, height=SIDES, share=st.floats(0.01, 1))
@settings(max_examples=100)
def test_a_central_square_lies_inside_the_image(width: int, height: int, share: float) -> None:
    """At least one pixel large, and centred to a pixel."""
    ((x, y, wide, tall),) = central_squares(shape_of(width, height), share).tolist()
    assert 1 <= wide == tall
    assert 0 <= width - wide - 2 * x <= 1
    assert 0 <= height - tall - 2 * y <= 1


# ---- the evaluation's view


@given(width=SIDES, height=SIDES, resize=st.integers(1, 600), part=st.floats(0, 1))
@settings(max_examples=300)
def test_resizing_and_cropping_is_torchvisions_geometry(
    width: int, height: int, resize: int, part: float
) -> None:
    """The size of the whole image, and the corner of its centre, for any shape."""
    size = max(1, round(part * resize))
    shapes, corners = resized_centres(shape_of(width, height), resize=resize, size=size)
    tall, wide = vision._compute_resized_output_size((height, width), [resize])
    assert shapes.tolist() == [[wide, tall]]
    # `torchvision.transforms.functional.center_crop`
    assert corners.tolist() == [[round((wide - size) / 2.0), round((tall - size) / 2.0)]]
    assert shapes.dtype == corners.dtype == np.int32


def test_the_geometry_is_that_of_torchvisions_own_transforms() -> None:
    """On pixels that are their own coordinates: the whole of `Resize`, the part of `CenterCrop`."""
    rng = np.random.default_rng(0)
    for width, height in [*rng.integers(20, 300, (40, 2)).tolist(), (256, 256), (73, 300)]:
        for resize, size in ((73, 64), (256, 224), (40, 33), (50, 50)):
            shapes, corners = resized_centres(shape_of(width, height), resize=resize, size=size)
            image = Resize(resize)(Image.new("L", (width, height)))
            assert list(image.size) == shapes[0].tolist()
            wide, tall = image.size
            places = torch.stack(
                torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij")
            )
            cropped = vision.center_crop(places, [size, size])
            assert cropped[:, 0, 0].tolist() == corners[0, ::-1].tolist()
            assert cropped[:, -1, -1].tolist() == (corners[0, ::-1] + size - 1).tolist()


def test_the_views_of_a_batch_do_not_mix() -> None:
    """500 images of different shapes, each as alone."""
    shapes = np.random.default_rng(1).integers(1, 900, (500, 2)).astype(np.int32)
    together = resized_centres(shapes, resize=256, size=224)
    alone = [resized_centres(shape[None], resize=256, size=224) for shape in shapes]
    for all_rows, rows in zip(together, zip(*alone, strict=True), strict=True):
        assert np.array_equal(all_rows, np.concatenate(rows))
