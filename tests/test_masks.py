"""`Masks`: algebra, counts, the digest by which they are stored, and what can be pruned at all."""

import hashlib
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from data.errors import UserError
from pruning.masks import LayerDensity, Masks, prunable
from pruning.packing import pack_bits, unpack_bits


def bits(text: str) -> Tensor:
    """`"101 010"` as two rows of three."""
    rows = [[character == "1" for character in row] for row in text.split()]
    return torch.tensor(rows if len(rows) > 1 else rows[0])


class Tiny(nn.Module):
    """A convolution, a normalisation, a block with a linear layer, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.block = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        self.fc = nn.Linear(4, 2)


# ---- algebra


def test_and_keeps_what_both_keep() -> None:
    """The truth table, in two layers."""
    one = Masks({"a": bits("1100"), "b": bits("11")})
    other = Masks({"b": bits("10"), "a": bits("1010")})
    both = one & other
    assert list(both) == ["a", "b"]
    assert both["a"].tolist() == [True, False, False, False]
    assert both["b"].tolist() == [True, False]
    assert one["a"].tolist() == [True, True, False, False]  # the operands stay as they were
    assert other["a"].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"a": bits("1100")}, "b"),
        ({"a": bits("1100"), "b": bits("11"), "c": bits("1")}, "c"),
        ({"a": bits("11 00"), "b": bits("11")}, "a"),
    ],
)
def test_masks_of_different_weights_do_not_mix(other: dict[str, Tensor], named: str) -> None:
    """A missing layer, one too many, another shape: each is named."""
    masks = Masks({"a": bits("1100"), "b": bits("11")})
    for left, right in ((masks, Masks(other)), (Masks(other), masks)):
        with pytest.raises(ValueError, match=f"masks of different weights: {named}$"):
            left & right


def test_density_counts_weights_and_not_layers() -> None:
    """4 of 12 are kept, though the layers' densities average to a half."""
    masks = Masks({"small": bits("11"), "large": bits("10000 00001")})
    assert (masks.kept, masks.size, masks.density) == (4, 12, 4 / 12)


def test_the_table_lists_layers_in_their_order() -> None:
    """Name, shape, count and density of each."""
    masks = Masks({"z": bits("101 010"), "a": bits("0001")})
    assert masks.table() == [LayerDensity("z", (2, 3), 3, 6), LayerDensity("a", (4,), 1, 4)]
    assert [row.density for row in masks.table()] == [0.5, 0.25]


def test_masks_are_equal_when_their_bits_are() -> None:
    """In any order; never to something that is no `Masks`."""
    masks = Masks({"a": bits("10"), "b": bits("0")})
    assert masks == Masks({"b": bits("0"), "a": bits("10")})
    assert masks != Masks({"a": bits("10"), "b": bits("1")})
    assert masks != {"a": bits("10"), "b": bits("0")}


def test_masks_do_not_follow_the_dictionary_they_were_made_of() -> None:
    """A later change of the dictionary changes nothing."""
    source = {"a": bits("10")}
    masks = Masks(source)
    source["b"] = bits("1")
    assert list(masks) == ["a"]


def test_masks_cannot_be_hashed_or_assigned_to() -> None:
    """They are a read-only mapping, compared by content."""
    masks = Masks({"a": bits("10")})
    with pytest.raises(TypeError):
        hash(masks)
    with pytest.raises(TypeError):
        masks["a"] = bits("11")  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_a_mask_that_is_not_boolean_is_refused(dtype: torch.dtype) -> None:
    """By the name of its layer: a float mask would silently scale weights."""
    with pytest.raises(TypeError, match=re.escape(f"mask of fc.weight is {dtype}, not bool")):
        Masks({"a": bits("10"), "fc.weight": torch.ones(2, dtype=dtype)})


def test_moving_masks_keeps_their_digest() -> None:
    """`to` gives equal masks."""
    masks = Masks({"a": bits("10"), "b": bits("101 010")})
    moved = masks.to("cpu")
    assert moved is not masks
    assert moved.digest() == masks.digest()


# ---- the digest


def test_the_digest_is_pinned_for_ever() -> None:
    """Computed by hand from the format: tickets in a store are found by it."""
    masks = Masks({"b.weight": bits("100000011"), "a.weight": bits("100 101")})
    first = hashlib.sha256(bytes([0b101001])).hexdigest()
    second = hashlib.sha256(bytes([0b10000001, 0b1])).hexdigest()
    text = (
        f'{{"a.weight":{{"chunks":["{first}"],"shape":[2,3]}},'
        f'"b.weight":{{"chunks":["{second}"],"shape":[9]}}}}'
    )
    assert masks.digest() == hashlib.sha256(text.encode()).hexdigest()
    assert masks.digest() == "9d3463f993d6ac39f9bd6ca32f736696799cbda658e2ed1edf0cfe33fc85c58b"


def test_the_digest_does_not_depend_on_the_order_of_layers() -> None:
    """Two programs that build masks in another order name the same ticket."""
    one = Masks({"a": bits("1010"), "b": bits("01"), "c": bits("1")})
    other = Masks({"c": bits("1"), "a": bits("1010"), "b": bits("01")})
    assert one.digest() == other.digest()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_the_digest_does_not_depend_on_the_layout_in_memory(layout: str) -> None:
    """Row-major order of the indices counts, whatever the strides are."""
    mask = torch.rand(4, 3, 5, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    same = {
        "channels_last": mask.to(memory_format=torch.channels_last),
        "transposed": mask.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "strided": torch.stack([mask, ~mask], -1)[..., 0],
    }[layout]
    assert same.stride() != mask.stride()
    assert Masks({"a": same}).digest() == Masks({"a": mask}).digest()


@pytest.mark.parametrize(
    "other",
    [
        {"a": bits("100 101"), "c": bits("11")},  # another name
        {"a": bits("100101"), "b": bits("11")},  # another shape, the same bits
        {"a": bits("10 01 01"), "b": bits("11")},  # another shape of the same rank
        {"a": bits("100 101"), "b": bits("10")},  # one bit
        {"a": bits("100 101")},  # a layer less
        {"b": bits("100 101"), "a": bits("11")},  # the names swapped
        {"a": bits("100 101"), "b": bits("110")},  # a pruned weight more, the same bytes
    ],
)
def test_any_other_name_shape_or_bit_is_another_digest(other: dict[str, Tensor]) -> None:
    """Each of them alone."""
    masks = Masks({"a": bits("100 101"), "b": bits("11")})
    assert Masks(other).digest() != masks.digest()


# ---- projection


def test_projecting_zeroes_exactly_the_pruned_weights() -> None:
    """In place, also in a channels_last model, also where the weight is not finite."""
    model = Tiny().to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = prunable(model)
    masks = Masks({n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in weights.items()})
    pruned = (~masks["fc.weight"]).nonzero()
    with torch.no_grad():
        model.fc.weight[tuple(pruned[0])] = float("nan")
        model.fc.weight[tuple(pruned[1])] = -float("inf")
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    masks.project_(model)
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name in masks:
            expected = torch.where(masks[name], expected, torch.zeros(()))
        assert torch.equal(parameter, expected), name
        assert parameter.data_ptr() == addresses[name]


def test_projecting_twice_is_projecting_once() -> None:
    """And leaves no gradient history."""
    model = nn.Linear(4, 1)
    masks = Masks({"weight": bits("1010").view(1, 4)})
    masks.project_(model)
    once = model.weight.detach().clone()
    masks.project_(model)
    assert torch.equal(model.weight, once)
    assert model.weight.is_leaf
    assert model.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("gone.weight", (2, 4), "no such weight"),
        ("fc.weight", (4, 2), r"\(2, 4\)"),
        ("fc.weight", (8,), r"\(2, 4\)"),
    ],
)
def test_a_mask_that_does_not_fit_the_model_is_named(
    name: str, shape: tuple[int, ...], found: str
) -> None:
    """With both shapes; a broadcast is no fit."""
    masks = Masks({name: torch.ones(shape, dtype=torch.bool)})
    with pytest.raises(ValueError, match=rf"mask of {name}: {re.escape(str(shape))}.*{found}"):
        masks.project_(Tiny())


# ---- what can be pruned


def test_convolutions_and_linear_layers_can_be_pruned_and_nothing_else() -> None:
    """Not biases, not normalisations, not embeddings; in layer order."""
    model = Tiny()
    weights = prunable(model)
    assert list(weights) == ["stem.weight", "block.0.weight", "block.2.weight", "fc.weight"]
    assert weights["stem.weight"] is model.stem.weight
    others = nn.Sequential(nn.Embedding(3, 4), nn.Conv1d(4, 4, 1), nn.Conv3d(4, 4, 1))
    assert list(prunable(others)) == ["1.weight", "2.weight"]


def test_a_model_that_is_one_layer_has_one_weight() -> None:
    """Its name has no leading dot, and projects."""
    model = nn.Linear(3, 2)
    masks = Masks.ones(model)
    assert list(masks) == ["weight"]
    masks.project_(model)


def test_dense_masks_keep_everything() -> None:
    """24 + 12 + 16 + 8 weights, all `True`."""
    masks = Masks.ones(Tiny())
    assert (masks.kept, masks.size, masks.density) == (60, 60, 1.0)
    assert masks["stem.weight"].shape == (3, 2, 2, 2)
    assert masks["stem.weight"].dtype == torch.bool


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["fc"], ["stem", "block.0", "block.2"]),
        (["block.*"], ["stem", "fc"]),
        (["*.0", "stem"], ["block.2", "fc"]),
        (["block.[02]", "block.0"], ["stem", "fc"]),
        ([], ["stem", "block.0", "block.2", "fc"]),
    ],
)
def test_excluded_layers_are_left_out(exclude: list[str], left: list[str]) -> None:
    """By patterns of module names; two patterns may match the same layer."""
    assert list(prunable(Tiny(), exclude)) == [f"{name}.weight" for name in left]
    assert list(Masks.ones(Tiny(), exclude)) == [f"{name}.weight" for name in left]


@pytest.mark.parametrize(
    ("pattern", "near"), [("steam", "; did you mean 'stem'?"), ("block0", "; did you mean 'block.")]
)
def test_a_pattern_that_matches_nothing_has_a_near_miss(pattern: str, near: str) -> None:
    """A misspelt exclusion must not prune the layer that it meant to spare."""
    with pytest.raises(UserError, match="matches no convolution or linear layer") as caught:
        prunable(Tiny(), ["fc", pattern])
    assert f"exclude = {pattern!r} matches" in str(caught.value)
    assert near in str(caught.value)


def test_a_pattern_of_a_normalisation_matches_nothing() -> None:
    """It cannot be pruned anyway, so that excluding it is a mistake."""
    with pytest.raises(UserError, match="exclude = 'norm' matches no convolution"):
        prunable(Tiny(), ["norm"])


def test_excluding_everything_is_an_error() -> None:
    """Nothing would be left to prune."""
    with pytest.raises(UserError, match="exclude leaves no layer to prune"):
        prunable(Tiny(), ["*"])


def tied_layers() -> nn.Sequential:
    """Two linear layers that share one weight of 4 x 4."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_count_once() -> None:
    """Under the name of the first layer."""
    masks = Masks.ones(tied_layers())
    assert list(masks) == ["0.weight"]
    assert masks.size == 16


def test_masks_of_a_weight_whose_first_layer_is_excluded_fit_the_model() -> None:
    """What `Masks.ones` gives can be projected: either excluded, or under its canonical name."""
    model = nn.Sequential(tied_layers(), nn.Linear(4, 2))
    Masks.ones(model, ["0.0"]).project_(model)


def test_masks_of_a_classifier_tied_to_an_embedding_fit_the_model() -> None:
    """The weight's canonical name is the embedding's."""
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    Masks.ones(model).project_(model)


# ---- bits


@given(arrays.arrays(bool, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)))
@settings(max_examples=100)
def test_unpacking_gives_back_what_was_packed(values: np.ndarray) -> None:
    """Any shape, scalars and empty tensors included, in as few bytes as there can be."""
    mask = torch.from_numpy(values.copy())
    packed = pack_bits(mask)
    assert len(packed) == (mask.numel() + 7) // 8
    restored = unpack_bits(packed, tuple(mask.shape))
    assert restored.dtype == torch.bool
    assert torch.equal(restored, mask)


def test_the_first_weight_is_the_lowest_bit() -> None:
    """Row-major; the unused bits at the end are zero."""
    assert pack_bits(bits("1000000001")) == bytes([0b00000001, 0b00000010])
    assert pack_bits(bits("110 001")) == bytes([0b00100011])
    assert pack_bits(bits("110 001").T) == bytes([0b00100101])


@given(st.binary(min_size=2, max_size=2))
@settings(max_examples=50)
def test_packing_gives_back_the_bytes(packed: bytes) -> None:
    """Sixteen weights fill two bytes, so that any two bytes are masks."""
    assert pack_bits(unpack_bits(packed, (4, 4))) == packed


@pytest.mark.parametrize(("num_bytes", "shape"), [(1, (3, 3)), (3, (3, 3)), (0, (1,)), (1, (0, 5))])
def test_a_wrong_number_of_bytes_is_an_error(num_bytes: int, shape: tuple[int, ...]) -> None:
    """Too few and too many."""
    with pytest.raises(ValueError, match=f"{num_bytes} bytes for {np.prod(shape)} weights"):
        unpack_bits(bytes(num_bytes), shape)


@pytest.mark.parametrize("last", [0b00000010, 0b10000000])
def test_a_stray_bit_is_an_error(last: int) -> None:
    """Nine weights use one bit of the second byte; another one means damage."""
    assert unpack_bits(bytes([255, 1]), (3, 3)).all()
    with pytest.raises(ValueError, match="bits beyond the last weight"):
        unpack_bits(bytes([255, 1 | last]), (3, 3))
