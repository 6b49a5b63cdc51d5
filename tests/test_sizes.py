"""Progressive resizing: the size of an epoch; and what the `data` section refuses."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.arrays import READERS
from data.config import ON_DISK, DataConfig
from data.errors import UserError
from train.sizes import size_of_epoch

FFCV = ("160", "160@65ep", "192@76ep")
STEPS, EPOCHS = 10, 88


def sizes(*points: str, steps_per_epoch: int = STEPS, epochs: int = EPOCHS) -> list[int]:
    """The size of each epoch."""
    config = DataConfig("imagenet", size=points)
    side_of = size_of_epoch(
        config, steps_per_epoch=steps_per_epoch, total_steps=steps_per_epoch * epochs
    )
    return [side_of(epoch) for epoch in range(epochs)]


# ---- the size of an epoch


def test_ffcvs_recipe_is_ffcvs() -> None:
    """160 for 65 epochs, 192 from epoch 76, between them as `get_resolution` of its rn50 script."""
    ffcv = [round(np.interp(e, [65, 76], [160, 192]) / 32) * 32 for e in range(EPOCHS)]
    found = sizes(*FFCV)
    assert found == ffcv
    assert found == [160] * 71 + [192] * 17  # 71 is the first epoch above 176


def test_without_points_images_have_224_pixels() -> None:
    """In every epoch."""
    assert set(sizes()) == {224}


@pytest.mark.parametrize("side", [16, 33, 100, 223])
def test_a_constant_size_is_not_rounded(side: int) -> None:
    """Alone, before the first point, after the last, and between equal ones."""
    assert set(sizes(str(side))) == {side}
    assert set(sizes(f"{side}@5ep")) == {side}
    assert set(sizes(str(side), f"{side}@5ep", f"{side}@9ep")) == {side}
    assert sizes(f"{side}@2ep", "320@8ep", epochs=10)[:3] == [side] * 3
    assert sizes("320@2ep", f"{side}@8ep", epochs=12)[8:] == [side] * 4


def test_between_two_points_sizes_are_linear_in_multiples_of_32() -> None:
    """From 128 to 256 in five epochs, by hand; at the points their own, also in the middle."""
    assert sizes("128", "256@5ep", epochs=7) == [128, 160, 192, 192, 224, 256, 256]
    assert sizes("100", "150@2ep", "100@4ep", epochs=6) == [100, 128, 150, 128, 100, 100]


def test_a_size_may_fall() -> None:
    """As in a training that ends on small images."""
    assert sizes("256", "128@4ep", epochs=6) == [256, 224, 192, 160, 128, 128]


def test_two_points_at_once_are_a_jump() -> None:
    """The later one holds from there on."""
    assert sizes("160", "160@3ep", "224@3ep", epochs=5) == [160, 160, 160, 224, 224]


@pytest.mark.parametrize(("first", "last"), [("3ep", "5ep"), ("30it", "50it"), ("30%", "50%")])
def test_points_may_be_epochs_steps_or_percent(first: str, last: str) -> None:
    """Of ten epochs of ten steps."""
    found = sizes("128", f"128@{first}", f"256@{last}", epochs=10)
    assert found == [128, 128, 128, 128, 192, 256, 256, 256, 256, 256]


def test_an_epoch_has_the_size_of_its_first_step() -> None:
    """A point in mid-epoch holds from the next epoch on."""
    assert sizes("128", "128@25it", "224@25it", epochs=5) == [128, 128, 128, 224, 224]


@given(
    start=st.integers(1, 12).map(lambda n: 32 * n),
    end=st.integers(1, 12).map(lambda n: 32 * n),
    first=st.integers(0, 30),
    length=st.integers(1, 40),
)
def test_sizes_go_monotonically_from_one_to_the_other(
    start: int, end: int, first: int, length: int
) -> None:
    """In multiples of 32, never beyond either."""
    found = sizes(str(start), f"{start}@{first}ep", f"{end}@{first + length}ep", epochs=80)
    assert found[: first + 1] == [start] * (first + 1)
    assert set(found[first + length :]) == {end}
    assert all(side % 32 == 0 and min(start, end) <= side <= max(start, end) for side in found)
    assert found == sorted(found, reverse=end < start)


def test_points_that_do_not_follow_one_another_are_refused() -> None:
    """Which is known only with the length of the training, where units differ."""
    with pytest.raises(UserError, match=r"data\.size = '160 160@9ep 192@4ep': .* follow one"):
        sizes("160", "160@9ep", "192@4ep")
    with pytest.raises(UserError, match="must follow one another"):
        sizes("160", "160@50%", "192@10ep", epochs=30)
    assert sizes("160", "160@50%", "192@20ep", epochs=30)[-1] == 192


@pytest.mark.parametrize("after", ["5", "ep", "5epochs", "-3ep", "1.5it", ""])
def test_a_point_at_no_duration_is_refused(after: str) -> None:
    """By the whole schedule, before anything is read."""
    with pytest.raises(ValueError, match=rf"size = '160 192@{after}': "):
        DataConfig("imagenet", size=("160", f"192@{after}"))


# ---- the `data` section


@pytest.mark.parametrize(
    "points",
    [("15",), ("4097",), ("160px",), ("160", "192"), ("",), ("224@",), ("160", "@5ep"), ("-32",)],
)
def test_a_size_that_is_none_is_refused(points: tuple[str, ...]) -> None:
    """Too small, too large, without a place in time, or no number: with an example."""
    with pytest.raises(ValueError, match=r"size = '.*': write 224, or a schedule as 160 160@65ep"):
        DataConfig("folder", size=points)


@pytest.mark.parametrize("source", READERS)
@pytest.mark.parametrize(
    "options", [{"size": ("32",)}, {"eval_size": 32}, {"eval_resize": 36}, {"color_jitter": 0.4}]
)
def test_images_in_memory_have_their_own_size(source: str, options: dict[str, Any]) -> None:
    """What resizes or colours image files is refused for them, by its name."""
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name} = .*: source '{source}' has images of one"):
        DataConfig(source, **options)


@pytest.mark.parametrize("source", ON_DISK)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads = 0: must be at least 1"),
        ({"prefetch": 1}, "prefetch = 1: must be at least 2"),
        ({"min_crop": 0.0}, r"min_crop = 0\.0: must be in \(0, 1\]"),
        ({"min_crop": 1.5}, r"min_crop = 1\.5"),
        ({"min_crop": float("nan")}, "min_crop = nan"),
        ({"color_jitter": -0.1}, r"color_jitter = -0\.1: must be in \[0, 1\]"),
        ({"color_jitter": 2.0}, r"color_jitter = 2\.0"),
        ({"eval_size": 0}, "eval_size = 0"),
        ({"eval_resize": -1}, "eval_resize = -1"),
        ({"eval_size": 224, "eval_resize": 200}, "eval_resize = 200: .* at least eval_size, 224"),
        ({"size": ("256",), "eval_resize": 250}, "eval_resize = 250: .* at least eval_size, 256"),
    ],
)
def test_an_impossible_value_is_refused(source: str, options: dict[str, Any], message: str) -> None:
    """By its name and its value."""
    with pytest.raises(ValueError, match=f"^{message}"):
        DataConfig(source, **options)


@pytest.mark.parametrize(
    ("options", "size", "resize"),
    [
        ({}, 224, 256),
        ({"size": ("64",)}, 64, 73),
        ({"size": FFCV}, 192, 219),
        ({"size": FFCV, "eval_size": 256}, 256, 293),
        ({"eval_size": 288, "eval_resize": 288}, 288, 288),
        ({"eval_resize": 232}, 224, 232),
    ],
)
def test_the_evaluations_sizes_follow_the_last_training_size(
    options: dict[str, Any], size: int, resize: int
) -> None:
    """256/224 of it, rounded, before its centre is cut out; unless they are given."""
    config = DataConfig("imagenet", **options)
    assert (config.evaluation_size, config.evaluation_resize) == (size, resize)


def test_a_source_may_bring_its_place() -> None:
    """`KIND:PATH` takes the place of root, also with a URL; without a path root holds."""
    config = DataConfig("webdataset:s3://bucket/a:b", root="/elsewhere")
    assert (config.kind, config.place) == ("webdataset", "s3://bucket/a:b")
    assert DataConfig("folder", root="/somewhere").place == "/somewhere"
    assert DataConfig("folder:", root="/somewhere").place == "/somewhere"
