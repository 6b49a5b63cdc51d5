"""N of every M weights along a layer's inputs: truth tables, ties, exact counts, misfits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.errors import UserError
from pruning.masks import Masks
from pruning.n_of_m import Pattern, n_of_m, random_n_of_m


def rows(mask: Tensor) -> list[str]:
    return ["".join("1" if kept else "0" for kept in row) for row in mask.flatten(1).tolist()]


def test_of_every_four_inputs_the_two_largest_are_kept() -> None:
    """Each group by itself; of equal scores the first."""
    scores = torch.tensor(
        [
            [0.1, 0.4, 0.2, 0.3, 9.0, 8.0, 7.0, 6.0],
            [5.0, 5.0, 5.0, 5.0, -1.0, -4.0, -2.0, -3.0],
            [0.0, 1.0, 0.0, 0.0, 2.0, 1.0, 2.0, 2.0],
        ]
    )
    masks = n_of_m({"w": scores})
    assert rows(masks["w"]) == ["01011100", "11001010", "11001010"]


@pytest.mark.parametrize(
    ("n", "m", "expected"),
    [(1, 2, "01100110"), (1, 4, "01000010"), (3, 4, "11100111"), (1, 8, "00000010")],
)
def test_other_patterns_of_eight(n: int, m: int, expected: str) -> None:
    scores = torch.tensor([[1.0, 8.0, 4.0, 0.0, 2.0, 5.0, 9.0, 3.0]])
    assert rows(n_of_m({"w": scores}, n, m)["w"]) == [expected]


def test_the_groups_of_a_convolution_go_along_its_input_channels() -> None:
    """At each place of the kernel by itself, as 2:4 tensor cores have it."""
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    scores[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask = n_of_m({"conv": scores})["conv"]
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]
    assert mask.is_contiguous()


@given(
    groups=st.integers(1, 3),
    out=st.integers(1, 3),
    kernel=st.sampled_from([(), (3,), (3, 2)]),
    pattern=st.sampled_from(["2:4", "1:4", "1:2", "3:8"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=60)
def test_every_group_keeps_exactly_n(
    groups: int, out: int, kernel: tuple[int, ...], pattern: str, seed: int
) -> None:
    """Also of scores many of which are equal, and at random."""
    n, m = Pattern.parse(pattern)
    shape = (out, groups * m, *kernel)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, shape, generator=generator).float()
    for masks in (
        n_of_m({"w": scores}, n, m),
        random_n_of_m({"w": shape}, n, m, seed, misfits="refuse"),
    ):
        by_group = masks["w"].view(out, groups, m, -1).sum(2)
        assert bool((by_group == n).all())
        assert masks.kept == Pattern(n, m).counts({"w": shape})["w"] == math.prod(shape) * n // m


def test_what_is_left_of_a_group_is_chosen_among() -> None:
    """3:4 narrowed to 2:4: what was pruned does not come back, however high its score."""
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    within = Masks({"w": torch.tensor([[False, True, True, True]])})
    assert rows(n_of_m({"w": scores}, within=within)["w"]) == ["0110"]


def test_a_layer_without_whole_groups_is_refused_or_dense() -> None:
    scores = {"stem.weight": torch.rand(8, 3, 3, 3), "fc.weight": torch.rand(2, 8)}
    with pytest.raises(UserError) as caught:
        n_of_m(scores)
    assert str(caught.value) == (
        "pattern = '2:4': stem.weight of (8, 3, 3, 3) has 3 inputs, not a multiple of 4: exclude "
        "it, or set misfits = 'dense' to leave such layers dense"
    )
    masks = n_of_m(scores, misfits="dense")
    assert bool(masks["stem.weight"].all())
    assert masks["fc.weight"].sum() == 8
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    assert [row.kept for row in masks.table()] == list(Pattern(2, 4).counts(shapes).values())


def test_random_patterns_are_those_of_their_seed() -> None:
    shapes = {"a": (4, 8), "b": (4, 8)}
    masks = random_n_of_m(shapes, 2, 4, 7, misfits="refuse")
    assert masks == random_n_of_m(shapes, 2, 4, 7, misfits="refuse")
    assert masks != random_n_of_m(shapes, 2, 4, 8, misfits="refuse")
    assert not torch.equal(masks["a"], masks["b"])


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="a score of w is NaN"):
        n_of_m({"w": torch.full((1, 4), float("nan"))})


@pytest.mark.parametrize("text", ["24", "0:4", "4:4", "5:4", "2:4:8", "", "2 of 4"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no pattern: write '2:4' for two of every four"):
        Pattern.parse(text)
