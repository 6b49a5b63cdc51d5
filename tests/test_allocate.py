"""From scores to masks: exact counts, truth tables of eight weights, and shuffled controls."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.errors import UserError
from pruning.allocate import (
    Scope,
    count_for,
    keep_count,
    keep_counts,
    keep_top,
    prune_fraction,
    shuffle_layers,
)
from pruning.masks import Masks

EIGHT = [0.3, 0.1, 0.2, 0.5, 0.4, 0.0, 0.7, 0.6]
FRACTIONS = ["0.1", "0.2", "0.3", "0.25", "0.05", "0.7", "0.9", "0.001"]


def layer(text: str) -> Tensor:
    """`"1010"` as a mask."""
    return torch.tensor([character == "1" for character in text])


def text(mask: Tensor) -> str:
    """A mask as `"1010"`."""
    return "".join("1" if kept else "0" for kept in mask.flatten().tolist())


def dense(size: int) -> Masks:
    """One layer `w`, all of it kept."""
    return Masks({"w": torch.ones(size, dtype=torch.bool)})


# ---- keeping the top


@pytest.mark.parametrize(
    ("density", "kept"),
    [
        (1.0, "11111111"),
        (0.875, "11111011"),
        (0.75, "10111011"),
        (0.5, "00011011"),
        (0.375, "00010011"),
        (0.125, "00000010"),
        (0.0625, "00000010"),  # half a weight rounds up to one
        (0.3, "00000011"),  # 2.4 weights
        (0.32, "00010011"),  # 2.56 weights
    ],
)
def test_of_eight_weights_these_are_kept(density: float, kept: str) -> None:
    """The highest scores, rounded to the nearest count."""
    assert text(keep_top({"w": torch.tensor(EIGHT)}, density)["w"]) == kept


@pytest.mark.parametrize(
    ("scope", "first", "second"), [("global", "0000", "1111"), ("layer", "0011", "1001")]
)
def test_the_scope_decides_whether_layers_compete(scope: Scope, first: str, second: str) -> None:
    """Half of all weights, or half of each layer."""
    scores = {"b": torch.tensor([1.0, 2, 3, 4]), "a": torch.tensor([8.0, 5, 6, 7])}
    masks = keep_top(scores, 0.5, scope=scope)
    assert list(masks) == ["b", "a"]
    assert (text(masks["b"]), text(masks["a"])) == (first, second)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_ties_are_kept_from_the_front(scope: Scope) -> None:
    """By layer order, then by index."""
    scores = {"b": torch.ones(4), "a": torch.ones(4)}
    masks = keep_top(scores, 0.5, scope=scope)
    expected = {"global": ("1111", "0000"), "layer": ("1100", "1100")}
    assert (text(masks["b"]), text(masks["a"])) == expected[scope]


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), percent=st.integers(1, 100))
@settings(max_examples=50)
def test_a_mask_has_exactly_the_count_that_was_asked_for(sizes: list[int], percent: int) -> None:
    """Nearest to the exact product, halves up, also where all scores are equal."""
    total = sum(sizes)
    count = (2 * percent * total + 100) // 200
    scores = {f"layer{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    if count:
        assert keep_top(scores, percent / 100).kept == count
    else:
        with pytest.raises(UserError, match="keeps none"):
            keep_top(scores, percent / 100)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, 2.0, float("nan"), float("inf")])
def test_a_density_outside_the_unit_interval_is_refused(scope: Scope, density: float) -> None:
    """With the value and the range."""
    with pytest.raises(UserError, match=f"density = {density}: must be above 0 and at most 1"):
        keep_top({"w": torch.ones(8)}, density, scope=scope)


def test_a_density_that_keeps_nothing_is_refused() -> None:
    """0.05 of eight weights rounds to none."""
    with pytest.raises(UserError, match=r"density = 0\.05 keeps none of 8 weights: keep more"):
        keep_top({"a": torch.ones(4), "b": torch.ones(4)}, 0.05)


def test_a_layer_that_would_be_left_empty_is_named() -> None:
    """0.1 of 100 weights is enough, 0.1 of four is none; globally that is allowed."""
    scores = {"big": torch.ones(100), "fc.weight": torch.zeros(4)}
    with pytest.raises(UserError, match=r"density = 0\.1 keeps none of the 4 weights of fc\.weigh"):
        keep_top(scores, 0.1, scope="layer")
    assert keep_top(scores, 0.1)["fc.weight"].sum() == 0


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [
        (1.0, 7, 7),
        (0.5, 7, 4),  # 3.5
        (0.1, 25, 3),  # 2.5
        (0.3, 5, 2),  # 1.5
        (0.35, 10, 4),  # 3.5, though the float 0.35 is a little less
        (0.145, 100, 15),  # 14.5, though the float 0.145 is a little less
        (0.2621, 25557032, 6698498),  # 6,698,498.0872 of ResNet-50's weights
        (1e-7, 10**7, 1),
        (1e-7, 4 * 10**6, 0),
    ],
)
def test_the_count_is_the_decimal_density_times_the_size(
    density: float, size: int, count: int
) -> None:
    """As a person computes it from the number in the config."""
    assert count_for(density, size) == count


def test_keeping_a_count_and_keeping_counts() -> None:
    """Over all layers, per layer, and within what is left."""
    scores = {"a": torch.tensor([4.0, 3, 2, 1]), "b": torch.tensor([8.0, 7, 6, 5])}
    within = Masks({"a": layer("1011"), "b": layer("0110")})
    assert [text(m) for m in keep_count(scores, 3).values()] == ["0000", "1110"]
    assert [text(m) for m in keep_count(scores, 3, within).values()] == ["1000", "0110"]
    counts = {"b": 1, "a": 2}
    assert [text(m) for m in keep_counts(scores, counts).values()] == ["1100", "1000"]
    assert [text(m) for m in keep_counts(scores, counts, within).values()] == ["1010", "0100"]
    with pytest.raises(ValueError, match="cannot select 3 of 2 scores"):
        keep_counts(scores, {"a": 1, "b": 3}, within)


# ---- rounds of pruning


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [
        (0.0, "11111111"),
        (0.125, "11111011"),
        (0.126, "10111011"),
        (0.2, "10111011"),  # ceil(1.6)
        (0.25, "10111011"),
        (0.5, "00011011"),
        (0.8, "00000010"),  # ceil(6.4)
        (1.0, "00000000"),
    ],
)
def test_of_eight_weights_these_survive_a_round(fraction: float, kept: str) -> None:
    """The ceil(fraction * 8) lowest go."""
    masks = prune_fraction({"w": torch.tensor(EIGHT)}, dense(8), fraction)
    assert text(masks["w"]) == kept


def test_of_equal_scores_the_last_are_pruned() -> None:
    """Exactly two of eight, and not all that lie at the threshold."""
    masks = prune_fraction({"w": torch.ones(8)}, dense(8), 0.25)
    assert text(masks["w"]) == "11111100"


def test_only_survivors_are_counted_and_pruned() -> None:
    """Of four survivors one goes, although pruned weights have lower and higher scores."""
    masks = Masks({"w": layer("10101010")})
    pruned = prune_fraction({"w": torch.tensor([3.0, 9, 1, 0, 2, 9, 4, 0])}, masks, 0.25)
    assert text(pruned["w"]) == "10001010"
    assert text(masks["w"]) == "10101010"


@pytest.mark.parametrize(
    ("fraction", "size", "pruned"),
    [
        (0.1, 30, 3),  # the float 0.1 is a little more than a tenth
        (0.7, 10, 7),
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001 in floats
        (0.2, 5, 1),
        (0.2, 6, 2),
        (0.2, 1, 1),
        (0.3, 10, 3),
        (0.001, 2, 1),
        (0.2, 54181 * 5, 54181),
    ],
)
def test_a_round_prunes_exactly_the_ceiling(fraction: float, size: int, pruned: int) -> None:
    """Of the decimal fraction: 0.1 of 30 is 3, and never one more."""
    masks = prune_fraction({"w": torch.arange(size).float()}, dense(size), fraction)
    assert size - masks.kept == pruned
    assert not masks["w"][:pruned].any()


@given(size=st.integers(1, 120), fraction=st.sampled_from(FRACTIONS), seed=st.integers(0, 9))
@settings(max_examples=50)
def test_a_round_never_prunes_one_more(size: int, fraction: str, seed: int) -> None:
    """The smallest count that is no less than the fraction; survivors stay nested."""
    scores = {"w": torch.randint(0, 5, (size,), generator=torch.Generator().manual_seed(seed))}
    floats = {name: score.float() for name, score in scores.items()}
    before = prune_fraction(floats, dense(size), 0.1)
    after = prune_fraction(floats, before, float(fraction))
    pruned = before.kept - after.kept
    assert Fraction(fraction) * before.kept <= pruned < Fraction(fraction) * before.kept + 1
    assert (after & before) == after


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_rounds_of_twenty_percent_leave_powers_of_four_fifths(scope: Scope) -> None:
    """5^7 weights in two layers: after round l exactly 0.8^l of them."""
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.rand(4 * 5**6, generator=generator),
        "b": torch.rand(5**6, generator=generator),
    }
    masks = Masks({name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()})
    for level in range(1, 7):
        masks = prune_fraction(scores, masks, 0.2, scope=scope)
        assert masks.kept == 4**level * 5 ** (7 - level)
        assert masks.density == pytest.approx(0.8**level, rel=1e-12)


def test_pruning_by_layer_takes_each_layers_own_share() -> None:
    """ceil(0.3 * 4) = 2 and ceil(0.3 * 3) = 1, whatever the scores of the other layer."""
    scores = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([9.0, 7, 8, 10])}
    masks = Masks({"a": layer("1111"), "b": layer("1110")})
    by_layer = prune_fraction(scores, masks, 0.3, scope="layer")
    assert (text(by_layer["a"]), text(by_layer["b"])) == ("0011", "1010")
    together = prune_fraction(scores, masks, 0.3)  # ceil(0.3 * 7) = 3
    assert (text(together["a"]), text(together["b"])) == ("0001", "1110")


@pytest.mark.parametrize("fraction", [1.5, -0.5])
def test_an_impossible_fraction_is_refused(fraction: float) -> None:
    """One cannot prune more than there is, nor bring weights back."""
    with pytest.raises((UserError, ValueError)):
        prune_fraction({"w": torch.ones(8)}, dense(8), fraction)


def test_a_layer_without_scores_is_an_error() -> None:
    """It must not be left out of the ticket, and so be trained dense."""
    masks = Masks({"a": layer("1111"), "b": layer("1111")})
    with pytest.raises((UserError, ValueError, KeyError)):
        prune_fraction({"a": torch.rand(4)}, masks, 0.5)


# ---- the random control


@pytest.fixture
def eight() -> Masks:
    """Three of eight in two layers, one of them a matrix."""
    return Masks({"fc.weight": layer("11100000"), "conv.weight": layer("00000111").view(2, 4)})


def test_shuffled_masks_are_pinned_for_ever(eight: Masks) -> None:
    """Computed by integer arithmetic: another choice would make old controls unrepeatable."""
    shuffled = shuffle_layers(eight, seed=0)
    assert text(shuffled["fc.weight"]) == "01100100"
    assert text(shuffled["conv.weight"]) == "01001010"
    assert shuffled["conv.weight"].shape == (2, 4)
    assert text(shuffle_layers(eight, seed=1)["fc.weight"]) == "01000101"


def test_shuffling_keeps_the_counts_of_every_layer() -> None:
    """Empty and full layers included, in the same order of layers."""
    generator = torch.Generator().manual_seed(0)
    masks = Masks(
        {
            "z": torch.rand(30, 7, generator=generator) < 0.2,
            "full": torch.ones(5, dtype=torch.bool),
            "empty": torch.zeros(2, 3, dtype=torch.bool),
            "a": torch.rand(4, 3, 3, 3, generator=generator) < 0.7,
        }
    )
    assert shuffle_layers(masks, seed=3).table() == masks.table()
    assert shuffle_layers(masks, seed=3) != masks


def test_another_seed_shuffles_differently() -> None:
    """Ten seeds give ten masks; the same seed gives the same."""
    masks = Masks({"a": layer("1" * 20 + "0" * 20), "b": layer("1" * 20 + "0" * 20)})
    assert len({shuffle_layers(masks, seed).digest() for seed in range(10)}) == 10
    assert shuffle_layers(masks, seed=4) == shuffle_layers(masks, seed=4)
    one = shuffle_layers(masks, seed=4)
    assert not torch.equal(one["a"], one["b"])  # layers of equal size have places of their own


def test_shuffling_forgets_which_places_were_kept() -> None:
    """Only the counts matter, so that the control holds nothing of the ticket."""
    one = Masks({"a": layer("11110000")})
    other = Masks({"a": layer("01010101")})
    assert shuffle_layers(one, seed=2) == shuffle_layers(other, seed=2)


def test_every_place_is_kept_equally_often() -> None:
    """Two of eight over 1,000 seeds: 250 +- 62 each (4.5 sd)."""
    masks = Masks({"a": layer("11000000")})
    counts = torch.stack([shuffle_layers(masks, seed)["a"].long() for seed in range(1000)]).sum(0)
    assert counts.sum() == 2000
    assert (counts - 250).abs().max() < 62
