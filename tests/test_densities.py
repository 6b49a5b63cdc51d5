"""How many weights each layer keeps: hand-computed counts, a float64 reference, exact sums."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from pruning.allocate import erk, random_masks, shuffle_layers
from pruning.densities import SHARINGS, balanced, uniform
from pruning.masks import Masks

Shapes = dict[str, tuple[int, ...]]


@pytest.mark.parametrize(
    ("density", "counts"),
    [
        # (4 + 4) / 16 = 1/2 and (8 + 4) / 32 = 3/8: eps = 16 / (8 + 12) = 0.8
        (1 / 3, [6, 10]),  # 0.8 * 8 = 6.4 and 9.6 of 16: the larger remainder gets the one left
        (0.5, [10, 14]),  # eps = 1.2: 9.6, 14.4
        (0.875, [16, 26]),  # eps = 2.1 would be 1.05 of the first: it is dense, 26 are left
        (1.0, [16, 32]),
    ],
)
def test_erk_by_hand(density: float, counts: list[int]) -> None:
    """Two linear layers of 16 and 32 weights."""
    assert list(erk({"a": (4, 4), "b": (8, 4)}, density).values()) == counts


def test_erk_counts_the_kernel() -> None:
    """[4, 4, 3, 3]: (4 + 4 + 3 + 3) / 144; against a linear layer of [14, 10]: 24 / 140.

    In proportion 14 : 24, so that of 76 weights the layers keep 28 and 48.
    """
    shapes: Shapes = {"conv": (4, 4, 3, 3), "fc": (14, 10)}
    assert erk(shapes, 76 / 284) == {"conv": 28, "fc": 48}


def test_the_power_of_erk_goes_from_uniform_to_the_paper() -> None:
    shapes: Shapes = {"a": (4, 4), "b": (8, 4), "c": (16, 16, 3, 3)}
    assert erk(shapes, 0.25, power_scale=0.0) == uniform(shapes, 0.25)
    small = [erk(shapes, 0.1, power_scale=power)["a"] for power in (0.0, 0.5, 1.0)]
    assert small == sorted(set(small))


@pytest.mark.parametrize(
    ("density", "counts"),
    [
        (0.1, [10, 10, 10]),
        (0.5, [20, 65, 65]),  # 50 each, but the first has only 20: 130 are left for two
        (0.51, [20, 67, 66]),  # an odd one goes to the first of equals
        (0.9, [20, 80, 170]),
        (1.0, [20, 80, 200]),
    ],
)
def test_balanced_by_hand(density: float, counts: list[int]) -> None:
    """Layers of 20, 80 and 200 weights keep the same number, or all they have."""
    shapes: Shapes = {"a": (2, 10), "b": (8, 10), "c": (10, 20)}
    assert list(balanced(shapes, density).values()) == counts


def test_uniform_by_hand() -> None:
    """A third of 10, 20 and 4 is 3 1/3, 6 2/3 and 1 1/3, in all 11: the second gets the one."""
    shapes: Shapes = {"a": (5, 2), "b": (5, 4), "c": (2, 2)}
    assert uniform(shapes, 0.3333) == {"a": 3, "b": 7, "c": 1}


def erk_reference(shapes: Shapes, density: float) -> dict[str, float]:
    """The real-valued numbers of weights, eps found by bisection in float64."""
    sizes = np.array([math.prod(shape) for shape in shapes.values()], np.float64)
    raw = np.array([sum(shape) for shape in shapes.values()]) / sizes
    low, high = 0.0, 1e9
    for _ in range(200):
        eps = (low + high) / 2
        kept = (np.minimum(1, eps * raw) * sizes).sum()
        low, high = (eps, high) if kept < density * sizes.sum() else (low, eps)
    return dict(zip(shapes, np.minimum(1, low * raw) * sizes, strict=True))


def resnet50() -> Shapes:
    from pruning.masks import prunable
    from train.models import ModelSpec

    outline = ModelSpec("resnet50", 1000, 3).outline()
    return {name: tuple(weight.shape) for name, weight in prunable(outline).items()}


@pytest.mark.parametrize("density", [0.01, 0.1, 0.2, 0.5, 0.9])
def test_erk_equals_a_reference_in_float64(density: float) -> None:
    """Of ResNet-50 every layer's number is the real one, rounded up or down; the sum is exact."""
    shapes = resnet50()
    counts, expected = erk(shapes, density), erk_reference(shapes, density)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert abs(sum(counts.values()) - density * total) <= 0.5
    for name, count in counts.items():
        assert abs(count - expected[name]) < 1.001


layers = st.lists(
    st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
)


@given(shapes=layers, percent=st.integers(1, 100), name=st.sampled_from(sorted(SHARINGS)))
@settings(max_examples=200)
def test_the_counts_sum_exactly_to_the_density(
    shapes: list[tuple[int, ...]], percent: int, name: str
) -> None:
    """Nearest to the exact product, halves up; between one and the size of each layer."""
    named = {f"layer{index}": shape for index, shape in enumerate(shapes)}
    total = sum(map(math.prod, shapes))
    try:
        counts = SHARINGS[name](named, percent / 100)
    except UserError as error:
        assert "keeps none of the" in str(error)  # noqa: PT017 - either is right
        return
    assert list(counts) == list(named)
    assert sum(counts.values()) == (2 * percent * total + 100) // 200
    assert all(0 < counts[layer] <= math.prod(shape) for layer, shape in named.items())


@pytest.mark.parametrize("name", sorted(SHARINGS))
def test_a_density_too_small_for_a_layer_names_it(name: str) -> None:
    shapes: Shapes = {"big.weight": (100, 100), "fc.weight": (2, 2)}
    with pytest.raises(UserError) as caught:
        SHARINGS[name](shapes, 0.0001)
    assert str(caught.value) == (
        "density = 0.0001 keeps none of the 4 weights of fc.weight: keep more, or leave that layer "
        "dense with exclude"
    )
    with pytest.raises(UserError, match=r"density = 1\.5: must be above 0 and at most 1"):
        SHARINGS[name](shapes, 1.5)


def test_random_masks_have_the_counts_that_are_asked_for() -> None:
    """The same places as shuffling masks of such counts: pinned in test_allocate."""
    shapes: Shapes = {"a": (5, 7), "b": (3, 2, 3, 3)}
    masks = random_masks(shapes, {"a": 9, "b": 54}, seed=4)
    assert [(row.shape, row.kept) for row in masks.table()] == [((5, 7), 9), ((3, 2, 3, 3), 54)]
    assert masks == shuffle_layers(Masks(dict(masks)), seed=4)
    assert masks != random_masks(shapes, {"a": 9, "b": 54}, seed=5)
