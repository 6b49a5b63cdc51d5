"""The grown unit: what an insertion makes of a block, what stays, and what pruning leaves alone."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from data.errors import UserError
from pruning.elastic import DepthChange, transform
from pruning.growth import (
    Insertion,
    change_of_logits,
    grown_masks,
    grown_spec,
    grown_state,
    insert,
    kept_ratio,
    prune_new,
    require_counts,
)
from pruning.masks import Masks
from train.models import ModelSpec
from train.stages import Stage, stages

MLP = ModelSpec("mlp", 3, 1, {"side": 2, "width": 4})


def blocks_after(spec: ModelSpec, grow: list[str], num_growths: int) -> list[int]:
    grown = grown_spec(spec, grow, num_growths)
    return [stage.num_blocks for stage in stages(grown.outline())]


# ---- depths


def test_stages_take_turns() -> None:
    spec = ModelSpec("cifar_resnet8", 10, 3)
    assert grown_spec(spec, [], 0) == spec
    assert [blocks_after(spec, [], d) for d in (1, 2)] == [[1, 1, 2], [1, 1, 3]]
    turns = ["stages.0", "stages.2"]
    found = [blocks_after(spec, turns, d) for d in (1, 2, 3)]
    assert found == [[2, 1, 1], [2, 1, 2], [3, 1, 2]]


def test_a_depth_is_a_network_that_its_specification_builds() -> None:
    """The options of the network stay."""
    spec = ModelSpec("cifar_resnet8", 10, 1, {"width": 4, "norm": "group"})
    assert grown_spec(spec, [], 2).arguments == {"width": 4, "norm": "group", "blocks": [1, 1, 3]}


@pytest.mark.parametrize(
    ("spec", "grow", "problem"),
    [
        (MLP, ["hiden"], r"grow = 'hiden': no stage of mlp, which has hidden"),
        (ModelSpec("vgg11", 10, 3), [], "vgg11 has no list of like blocks"),
        (ModelSpec("regnetx_002", 10, 3), ["s4"], "it takes no such list"),
    ],
)
def test_a_network_that_cannot_grow_is_one_line(
    spec: ModelSpec, grow: list[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        grown_spec(spec, grow, 1).outline()


def test_the_change_keeps_every_block_and_tells_what_is_new() -> None:
    one, two = (Stage("s", tuple("012"[:n]), "Unit") for n in (1, 3))
    change = DepthChange.appending([one], [two])
    assert change.maps == ((0,),)
    assert change.new_blocks == ["s.1.", "s.2."]
    names = ["stem.w", "s.0.w", "s.1.w", "s.2.w"]
    assert [change.is_new(name) for name in names] == [False, False, True, True]
    tensors = {"stem.w": torch.ones(2), "s.0.w": torch.full((3,), 2.0)}
    target = {name: torch.zeros(2 if name == "stem.w" else 3) for name in names}
    moved = transform(tensors, change, target)
    assert {name: value.tolist() for name, value in moved.items()} == {
        "stem.w": [1, 1],
        "s.0.w": [2, 2, 2],
    }


def test_a_change_to_fewer_blocks_is_no_growth() -> None:
    one, two = (Stage("s", tuple("01"[:n]), "Unit") for n in (1, 2))
    with pytest.raises(UserError, match="s does not begin with the blocks of s"):
        DepthChange.appending([two], [one])
    with pytest.raises(UserError, match="s has blocks Unit there, s Other here"):
        DepthChange.appending([one], [Stage("s", ("0", "1"), "Other")])


# ---- the new block


def inserted(insertion: Insertion, spec: ModelSpec = MLP) -> tuple[Any, Any, dict[str, Tensor]]:
    """The old state, the fresh deeper one, and the grown one."""
    target = grown_spec(spec, [], 1)
    old = spec.build(1).state_dict()
    return old, target.build(2).state_dict(), grown_state(old, spec, target, insertion, 2)


@pytest.mark.parametrize("insertion", ["literal", "preserving", "random"])
def test_all_that_was_there_stays(insertion: Insertion) -> None:
    old, fresh, grown = inserted(insertion, ModelSpec("cifar_resnet8", 10, 3, {"width": 4}))
    assert list(grown) == list(fresh)
    for name, value in grown.items():
        if name in old:
            assert torch.equal(value, old[name]), name
            assert value.data_ptr() != old[name].data_ptr()
        else:
            assert name.startswith("stages.2.1.")


def test_a_literal_linear_unit_is_the_identity() -> None:
    *_, grown = inserted("literal")
    assert torch.equal(grown["hidden.1.linear.weight"], torch.eye(4))
    assert not grown["hidden.1.linear.bias"].any()


def test_a_literal_residual_block_has_dirac_kernels() -> None:
    """1 in the middle of the kernel from each channel to itself; norms as they begin."""
    *_, grown = inserted("literal", ModelSpec("cifar_resnet_column", 2, 1, {"width": 3}))
    expected = torch.zeros(3, 3, 3, 3)
    for channel in range(3):
        expected[channel, channel, 1, 1] = 1
    for name in ("conv1", "conv2"):
        assert torch.equal(grown[f"blocks.1.{name}.weight"], expected)
    assert torch.equal(grown["blocks.1.norm2.weight"], torch.ones(3))


@torch.no_grad()
def test_a_literal_residual_block_doubles_what_it_takes() -> None:
    """So the paper's insertion is not preserving: the shortcut adds x to what the kernels give."""
    spec = ModelSpec("cifar_resnet_column", 2, 1, {"width": 3})
    model = grown_spec(spec, [], 1).build()
    model.load_state_dict(inserted("literal", spec)[2])
    block = model.get_submodule("blocks.1").eval()
    x = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(block(x), 2 * x, rtol=2e-5, atol=0)  # eps of the norms


def test_a_literal_attention_block_has_identities_and_no_biases() -> None:
    spec = ModelSpec("vit_tiny_patch16_224", 2, 3, {"blocks": [1], "embed_dim": 6, "num_heads": 2})
    *_, grown = inserted("literal", spec)
    new = {n: v for n, v in grown.items() if n.startswith("blocks.1.") and "norm" not in n}
    assert len(new) == 8
    for name, value in new.items():
        rows = value.shape[0]
        expected = torch.zeros(rows) if value.ndim == 1 else torch.eye(rows, value.shape[1])
        assert torch.equal(value, expected), name


def test_a_random_unit_is_as_the_network_is_built() -> None:
    _, fresh, grown = inserted("random")
    new = [name for name in grown if name.startswith("hidden.1.")]
    assert len(new) == 2
    assert all(torch.equal(grown[name], fresh[name]) for name in new)


VIT = {"blocks": [1], "embed_dim": 12, "num_heads": 2, "img_size": 32}
PRESERVED: list[tuple[str, dict[str, Any], str, int]] = [
    ("mlp", {"side": 8}, "hidden", 8),
    ("mlp", {"side": 8, "activation": "sign"}, "hidden", 8),
    ("cifar_resnet8", {"width": 4}, "stages.1", 16),
    ("cifar_resnet8", {"width": 4, "norm": "group"}, "stages.2", 16),
    ("cifar_resnet8", {"width": 4, "activation": "sign"}, "stages.0", 16),
    ("cifar_resnet_column", {}, "blocks", 16),
    ("resnet18", {"blocks": [1, 1, 1, 1], "width": 8}, "layer2", 32),
    ("resnet18", {"blocks": [1, 1, 1, 1], "width": 8, "activation": "sign"}, "layer2", 32),
    ("resnet50", {"blocks": [1, 1, 1, 1], "width": 8}, "layer3", 32),
    ("resnetv2_50", {"blocks": [1, 1, 1, 1]}, "stages.0.blocks", 32),
    ("convnext_atto", {"blocks": [1, 1, 1, 1]}, "stages.1.blocks", 32),
    ("convnextv2_atto", {"blocks": [1, 1, 1, 1]}, "stages.3.blocks", 32),
    ("vit_tiny_patch16_224", VIT, "blocks", 32),
    ("deit3_small_patch16_224", VIT, "blocks", 32),
]


@pytest.mark.parametrize(("name", "arguments", "stage", "side"), PRESERVED)
def test_a_preserving_insertion_changes_no_logit(
    name: str, arguments: dict[str, Any], stage: str, side: int
) -> None:
    spec = ModelSpec(name, 10, 3, arguments)
    change = change_of_logits(spec, grown_spec(spec, [stage], 1), (3, side, side), 5)
    assert change <= 1e-6


@torch.no_grad()
def test_a_trained_network_keeps_its_logits_in_float32() -> None:
    """Weights, statistics and norms as training leaves them, in place of fresh ones."""
    spec = ModelSpec("cifar_resnet8", 10, 3, {"width": 4})
    model, deeper = spec.build(0), grown_spec(spec, ["stages.1"], 1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    grown = deeper.build(1)
    grown.load_state_dict(grown_state(model.state_dict(), spec, deeper, "preserving", 1))
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(model.eval()(images), grown.eval()(images))


@torch.no_grad()
@pytest.mark.parametrize("insertion", ["literal", "random"])
def test_other_insertions_into_residual_networks_change_logits(insertion: Insertion) -> None:
    spec = ModelSpec("cifar_resnet8", 10, 3, {"width": 4})
    model, deeper = spec.build(0), grown_spec(spec, [], 1)
    grown = deeper.build(1)
    grown.load_state_dict(grown_state(model.state_dict(), spec, deeper, insertion, 1))
    images = torch.rand(4, 3, 16, 16)
    assert (model.eval()(images) - grown.eval()(images)).abs().max() > 1e-2


@torch.no_grad()
def test_a_block_of_regnet_preserves_too() -> None:
    """timm builds no RegNet of a given number of blocks; the block by itself is known."""
    model = timm.create_model("regnetx_002", num_classes=3).eval()
    grown = copy.deepcopy(model)
    grown.s4.add_module("b8", timm.create_model("regnetx_002").s4.b7)
    change = DepthChange.appending(stages(model), stages(grown))
    assert change.new_blocks == ["s4.b8."]
    insert(grown, change, "preserving")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), grown.eval()(images))


def test_a_block_of_which_no_preserving_insertion_is_known_is_one_line() -> None:
    def network(num_blocks: int) -> nn.Module:
        body = (nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(num_blocks))
        return nn.ModuleDict({"body": nn.Sequential(*body)})

    change = DepthChange.appending(stages(network(1)), stages(network(2)))
    expected = "no preserving insertion is known for blocks Sequential: choose insertion = "
    with pytest.raises(UserError, match=expected):
        insert(network(2), change, "preserving")


# ---- masks


def network(**weights: list[list[float]]) -> nn.Module:
    """Linear layers by name, of these weights."""
    layers = nn.ModuleDict()
    for name, rows in weights.items():
        layer = nn.Linear(len(rows[0]), len(rows), bias=False)
        layer.weight = nn.Parameter(torch.tensor(rows))
        layers[name] = layer
    return layers


def test_a_layer_keeps_its_largest_weights() -> None:
    """Half of five is three (2.5, rounded to the nearest), a fourth of four is one; ties first."""
    model = network(a=[[0.1, -0.5, 0.3, -0.3, 0.2]], b=[[1.0, -1.0], [0.5, 0.0]])
    assert prune_new(model, Masks({}), 0.5)["a.weight"].tolist() == [[0, 1, 1, 1, 0]]
    assert prune_new(model, Masks({}), 0.25)["b.weight"].tolist() == [[1, 0], [0, 0]]


def test_what_was_pruned_stays_as_it_is_and_is_never_pruned_again() -> None:
    """Even where its smaller weights have become the largest: the target is absolute."""
    model = network(a=[[0.1, 0.2, 9.0, 9.0]], b=[[1.0, 2.0, 3.0, 4.0]])
    frozen = Masks({"a.weight": torch.tensor([[True, True, False, False]])})
    pruned = prune_new(model, frozen, 0.5)
    assert pruned["a.weight"].tolist() == [[1, 1, 0, 0]]
    assert pruned["b.weight"].tolist() == [[0, 0, 1, 1]]
    assert prune_new(model, pruned, 0.5) == pruned
    assert list(pruned) == ["a.weight", "b.weight"]


def test_excluded_layers_are_in_no_mask_but_in_the_ratio() -> None:
    """2 of 4 kept, and 4 dense ones: 6 of 8."""
    model = network(a=[[0.1, 0.2, 9.0, 9.0]], b=[[1.0, 2.0, 3.0, 4.0]])
    masks = prune_new(model, Masks({}), 0.5, ["b"])
    assert list(masks) == ["a.weight"]
    assert kept_ratio(masks, model) == 0.75
    assert kept_ratio(prune_new(model, Masks({}), 0.5), model) == 0.5


def test_grown_masks_keep_the_old_ones_and_leave_the_new_layer_dense() -> None:
    shallow, deep = MLP.build(), grown_spec(MLP, [], 1).build()
    masks = prune_new(shallow, Masks({}), 0.25)
    grown = grown_masks(masks, shallow, deep, [])
    assert list(grown) == ["hidden.0.linear.weight", "hidden.1.linear.weight", "fc.weight"]
    assert all(torch.equal(grown[name], mask) for name, mask in masks.items())
    assert bool(grown["hidden.1.linear.weight"].all())


def test_a_pattern_may_be_about_layers_that_come_later() -> None:
    """It leaves them dense from the depth on at which they are there."""
    shallow, deep = MLP.build(), grown_spec(MLP, [], 1).build()
    exclude = ["hidden.1.*"]
    masks = prune_new(shallow, Masks({}), 0.25, exclude)
    assert list(masks) == ["hidden.0.linear.weight", "fc.weight"]
    assert list(grown_masks(masks, shallow, deep, exclude)) == list(masks)


def test_a_density_that_keeps_nothing_of_a_layer_is_one_line() -> None:
    """4 % of 12 weights is 0.48: none; of 16 it is one."""
    expected = r"density = 0\.04 keeps none of the 12 weights of fc\.weight: .*exclude = 'fc'"
    with pytest.raises(UserError, match=expected):
        require_counts(MLP.build(), 0.04, [])
    require_counts(MLP.build(), 0.04, ["fc"])
