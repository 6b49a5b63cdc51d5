"""Stages are read from the module tree: which lists of like blocks a network has."""

import pytest
import timm
import torch
from torch import nn

from train.models import ModelSpec
from train.stages import Stage, described, stages

FOUND = {
    "cifar_resnet8": "stages.0 1, stages.1 1, stages.2 1",
    "cifar_resnet20": "stages.0 3, stages.1 3, stages.2 3",
    "cifar_resnet18": "stages.0 2, stages.1 2, stages.2 2, stages.3 2",
    "cifar_resnet34": "stages.0 3, stages.1 4, stages.2 6, stages.3 3",
    "cifar_resnet_column": "blocks 1",
    "mlp": "hidden 1",
    "cifar_vgg_small": "stages.0 2, stages.1 2, stages.2 2",
    "cifar_vgg11": "stages.0 1, stages.1 1, stages.2 2, stages.3 2, stages.4 2",
    "cifar_vgg16": "stages.0 2, stages.1 2, stages.2 3, stages.3 3, stages.4 3",
    "resnet10t": "layer1 1, layer2 1, layer3 1, layer4 1",
    "resnet18": "layer1 2, layer2 2, layer3 2, layer4 2",
    "resnet50": "layer1 3, layer2 4, layer3 6, layer4 3",
    "resnet101": "layer1 3, layer2 4, layer3 23, layer4 3",
    "wide_resnet50_2": "layer1 3, layer2 4, layer3 6, layer4 3",
    "resnext50_32x4d": "layer1 3, layer2 4, layer3 6, layer4 3",
    "seresnet50": "layer1 3, layer2 4, layer3 6, layer4 3",
    "skresnet18": "layer1 2, layer2 2, layer3 2, layer4 2",
    "res2net50_26w_4s": "layer1 3, layer2 4, layer3 6, layer4 3",
    "resnest26d": "layer1 2, layer2 2, layer3 2, layer4 2",
    "resnetv2_50": "stages.0.blocks 3, stages.1.blocks 4, stages.2.blocks 6, stages.3.blocks 3",
    "regnetx_002": "s1 1, s2 1, s3 4, s4 7",
    "regnety_016": "s1 2, s2 6, s3 17, s4 2",
    "convnext_tiny": "stages.0.blocks 3, stages.1.blocks 3, stages.2.blocks 9, stages.3.blocks 3",
    "convnextv2_atto": "stages.0.blocks 2, stages.1.blocks 2, stages.2.blocks 6, stages.3.blocks 2",
    "mobilenetv2_100": (
        "blocks.0 1, blocks.1 2, blocks.2 3, blocks.3 4, blocks.4 3, blocks.5 3, blocks.6 1"
    ),
    "mobilenetv3_large_100": (
        "blocks.0 1, blocks.1 2, blocks.2 3, blocks.3 4, blocks.4 2, blocks.5 3, blocks.6 1"
    ),
    "efficientnet_b0": (
        "blocks.0 1, blocks.1 2, blocks.2 2, blocks.3 3, blocks.4 3, blocks.5 4, blocks.6 1"
    ),
    "vit_tiny_patch16_224": "blocks 12",
    "deit_small_patch16_224": "blocks 12",
    "deit_base_distilled_patch16_224": "blocks 12",
    "deit3_large_patch16_224": "blocks 24",
    "vgg16": "none",
}


@pytest.mark.parametrize("name", FOUND)
def test_the_stages_of(name: str) -> None:
    """... a network of each family, its lists of blocks and how many they hold."""
    assert described(stages(ModelSpec(name, 10, 3).outline())) == FOUND[name]


def test_a_stage_names_its_blocks_and_their_class() -> None:
    """RegNet counts from b1, and holds its blocks in no container."""
    first, *_ = stages(timm.create_model("regnetx_004"))
    second = stages(timm.create_model("regnetx_004"))[1]
    assert first == Stage("s1", ("b1",), "Bottleneck")
    assert second == Stage("s2", ("b1", "b2"), "Bottleneck")
    assert second.prefix(1) == "s2.b2."


@pytest.mark.parametrize(
    "name", timm.list_models(["resnet[0-9]*", "regnet[xy]*", "convnext_*"])[::4]
)
def test_the_four_stages_of_a_timm_network_hold_all_of_its_blocks(name: str) -> None:
    """A fourth of its ResNets, RegNets and ConvNeXts."""
    with torch.device("meta"):
        model = timm.create_model(name)
    found = [stage for stage in stages(model) if "stem" not in stage.name]
    kinds = {stage.kind for stage in found}
    num_blocks = sum(type(module).__name__ in kinds for module in model.modules())
    assert len(found) == 4
    assert sum(stage.num_blocks for stage in found) == num_blocks


class Branches(nn.Module):
    """A block with two branches of one class."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(2))


def test_a_list_within_a_block_is_no_stage() -> None:
    """Even where the stage has but two blocks."""
    model = nn.ModuleDict({"body": nn.Sequential(Branches(), Branches()), "fc": nn.Linear(4, 2)})
    assert described(stages(model)) == "body 2"


def test_a_list_of_lists_is_no_stage_but_its_lists_are() -> None:
    """Three lists of other widths."""

    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU())

    body = nn.Sequential(*(nn.Sequential(block(w), block(w)) for w in (2, 4, 8)))
    assert described(stages(nn.ModuleDict({"body": body}))) == "body.0 2, body.1 2, body.2 2"


def test_children_with_names_of_their_own_are_no_list() -> None:
    """A down-sampling layer and a list of blocks may be of one class."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    stage = nn.ModuleDict({"downsample": block(), "blocks": nn.Sequential(block(), block())})
    assert described(stages(nn.ModuleDict({"stage": stage}))) == "stage.blocks 2"


def test_bare_layers_are_no_blocks() -> None:
    """A list of convolutions, as within a Res2Net block."""
    convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(3))
    assert stages(nn.ModuleDict({"convs": convs})) == []


def test_of_two_stages_each_is_one() -> None:
    """A list of two lists of other widths is not taken for a stage of two blocks."""

    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU())

    body = nn.Sequential(*(nn.Sequential(block(w), block(w)) for w in (2, 4)))
    assert described(stages(nn.ModuleDict({"body": body}))) == "body.0 2, body.1 2"
