"""Models by name: shapes, sizes, initial weights and the errors of a wrong configuration."""

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from train.cifar import BasicBlock, CifarColumn, CifarResNet, CifarVgg, CifarVggSmall
from train.mlp import Mlp
from train.models import EXAMPLES, ModelConfig, ModelSpec, find_network, require_shapes, shaped_by
from train.stages import stages


def build(name: str, *, seed: int = 0, num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """The network of that name without options."""
    return ModelSpec(name, num_classes, in_chans).build(seed)


def num_weights(model: nn.Module) -> int:
    """All parameters, normalisations and biases included."""
    return sum(parameter.numel() for parameter in model.parameters())


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters and buffers are equal, bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# ---- the CIFAR networks


@pytest.mark.parametrize(
    "name",
    [
        *("cifar_resnet8", "cifar_resnet18", "cifar_resnet_column"),
        *("cifar_vgg11", "cifar_vgg13", "cifar_vgg_small"),
    ],
)
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (13, 20), (1, 1)])
@torch.no_grad()
def test_a_cifar_network_takes_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    """One score per class and image, all finite."""
    model = ModelSpec(name, 7, 2, {"width": 8}).build().eval()
    scores = model(torch.ones(3, 2, *size))
    assert scores.shape == (3, 7)
    assert bool(scores.isfinite().all())


def test_resnet_stages_halve_the_image_and_double_the_channels() -> None:
    """16, 32 and 64 channels at 32, 16 and 8 pixels."""
    model = build("cifar_resnet8")
    assert isinstance(model, CifarResNet)
    shapes: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


def test_vgg_stages_halve_the_image_four_times() -> None:
    """64, 128, 256, 512 and 512 channels at 32, 16, 8, 4 and 2 pixels."""
    model = build("cifar_vgg11")
    assert isinstance(model, CifarVgg)
    shapes: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    model(torch.zeros(2, 3, 32, 32))
    channels = (64, 128, 256, 512, 512)
    assert shapes == [(2, c, 32 >> i, 32 >> i) for i, c in enumerate(channels)]


def test_vgg_small_ends_in_a_map_of_4x4_that_is_flattened() -> None:
    """128, 256 and 512 channels at 32, 16 and 8 pixels, halved once more."""
    model = build("cifar_vgg_small")
    assert isinstance(model, CifarVggSmall)
    shapes: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 128, 32, 32), (2, 256, 16, 16), (2, 512, 8, 8)]
    assert model.fc.in_features == 512 * 4 * 4 == 8192


@pytest.mark.parametrize("side", [32, 64, 20, 8])
@torch.no_grad()
def test_vgg_small_pools_the_map_of_any_image_to_4x4(side: int) -> None:
    """After the three halvings, which leave an image of 32x32 pixels as it shall be."""
    model = ModelSpec("cifar_vgg_small", 5, 3, {"width": 4}).build()
    assert isinstance(model, CifarVggSmall)
    maps: list[Tensor] = []
    model.stages[-1].register_forward_hook(lambda m, args, out: maps.append(out))
    model.fc.register_forward_pre_hook(lambda m, args: maps.append(args[0]))
    model(torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)))
    halved = F.max_pool2d(maps[0].relu(), 2)
    assert (halved.shape[-2:] == (4, 4)) == (side == 32)
    assert torch.equal(maps[1], F.adaptive_max_pool2d(halved, 4).flatten(1))


def test_the_four_stages_of_resnet18_halve_the_image_thrice() -> None:
    """64, 128, 256 and 512 channels at 32, 16, 8 and 4 pixels: no pooling in the stem."""
    model = build("cifar_resnet18")
    assert isinstance(model, CifarResNet)
    shapes: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 64 << i, 32 >> i, 32 >> i) for i in range(4)]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("cifar_resnet18", 11_173_962),
        ("cifar_resnet34", 21_282_122),
        ("cifar_vgg_small", 4_574_592 + 3584 + 81_930),  # convolutions, normalisations, classifier
    ],
)
def test_the_networks_of_the_multi_prize_paper_have_their_sizes(name: str, weights: int) -> None:
    """With ten classes."""
    assert num_weights(ModelSpec(name, 10, 3).outline()) == weights


def test_the_names_of_the_tensors_stand_in_tickets() -> None:
    """By hand, of the smallest networks: they may not change."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    block = ["conv1.weight", *(f"norm1.{n}" for n in norm)]
    block += ["conv2.weight", *(f"norm2.{n}" for n in norm)]
    shortcut = ["shortcut.0.weight", *(f"shortcut.1.{n}" for n in norm)]
    resnet = ["conv1.weight", *(f"norm1.{n}" for n in norm), *(f"stages.0.0.{n}" for n in block)]
    resnet += [f"stages.{stage}.0.{n}" for stage in (1, 2) for n in (*block, *shortcut)]
    unit = ["0.weight", *(f"1.{n}" for n in norm)]
    units = ("0.0", "1.0", "2.0", "2.1", "3.0", "3.1", "4.0", "4.1")
    vgg = [f"stages.{place}.{n}" for place in units for n in unit]
    assert list(build("cifar_resnet8").state_dict()) == [*resnet, "fc.weight", "fc.bias"]
    assert list(build("cifar_vgg11").state_dict()) == [*vgg, "fc.weight", "fc.bias"]


@pytest.mark.parametrize("depth", [8, 14, 20, 32])
def test_a_resnet_has_as_many_layers_as_its_name_says(depth: int) -> None:
    """3x3 convolutions and the classifier; the two 1x1 shortcuts are not counted."""
    modules = list(build(f"cifar_resnet{depth}").modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    assert sum(conv.kernel_size == (3, 3) for conv in convolutions) == depth - 1
    assert sum(conv.kernel_size == (1, 1) for conv in convolutions) == 2


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_a_vgg_has_as_many_convolutions_as_the_paper_without_its_hidden_layers(depth: int) -> None:
    """VGG-16 has 13 convolutions and three linear layers; here one linear layer is left."""
    with torch.device("meta"):
        modules = list(CifarVgg(depth, num_classes=10).modules())
    assert sum(isinstance(m, nn.Conv2d) for m in modules) == depth - 3
    assert sum(isinstance(m, nn.Linear) for m in modules) == 1


def test_the_digits_model_has_78_thousand_weights() -> None:
    """By hand: stem 144, stages 4,608 + 14,336 + 57,344, classifier 650, normalisations 672."""
    model = build("cifar_resnet8", in_chans=1)
    assert num_weights(model) == 144 + 4608 + 14336 + 57344 + 650 + 672 == 77754


def test_resnet20_has_a_quarter_million_weights() -> None:
    """0.27 million, as in Table 6 of the ResNet paper (whose shortcuts have no weights)."""
    model = build("cifar_resnet20")
    shortcuts = sum(p.numel() for name, p in model.named_parameters() if "shortcut" in name)
    assert num_weights(model) == 272474
    assert shortcuts == 16 * 32 + 32 * 64 + 2 * 32 + 2 * 64
    assert num_weights(model) - shortcuts == 269722


def test_width_scales_the_channels() -> None:
    """ResNet-8 of width 4 ends in 16 channels, VGG-11 of width 4 in 32."""
    resnet = ModelSpec.of(ModelConfig("cifar_resnet8", width=4), num_classes=10, in_chans=1).build()
    vgg = ModelSpec.of(ModelConfig("cifar_vgg11", width=4), num_classes=10, in_chans=1).build()
    assert isinstance(resnet, CifarResNet)
    assert isinstance(vgg, CifarVgg)
    assert (resnet.fc.in_features, vgg.fc.in_features) == (16, 32)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_the_width_of_a_timm_resnet_is_that_of_its_first_stage(name: str) -> None:
    """128 is twice the usual, the wide ResNets of the multi-prize paper; the stem stays."""
    config = ModelConfig(name, width=128)
    model = ModelSpec.of(config, num_classes=10, in_chans=3).outline()
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    widths = [convolutions[f"layer{stage}.0.conv2"].out_channels for stage in (1, 2, 3, 4)]
    assert (convolutions["conv1"].out_channels, widths) == (64, [128, 256, 512, 1024])


def test_the_usual_width_builds_the_same_timm_resnet() -> None:
    usual, named = (ModelSpec("resnet18", 10, 3, given).build(1) for given in ({}, {"width": 64}))
    assert equal_states(usual, named)


def test_a_ticket_whose_timm_model_has_no_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"model regnetx_002: width = 8: it takes none"):
        ModelSpec("regnetx_002", 10, 3, {"width": 8}).build()


def test_weights_are_he_normal_and_biases_zero() -> None:
    """Standard deviation sqrt(2 / fan-in), of 36,864 and 640 draws."""
    model = build("cifar_resnet8")
    assert isinstance(model, CifarResNet)
    conv = model.get_parameter("stages.2.0.conv2.weight")
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert conv.mean().item() == pytest.approx(0, abs=0.002)
    assert model.fc.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.15)
    assert not model.fc.bias.any()


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_vgg11"])
@torch.no_grad()
def test_group_normalisation_makes_an_image_independent_of_its_batch(name: str) -> None:
    """In training mode, alone or among others; batch normalisation is the control."""
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    difference: dict[str, Tensor] = {}
    for norm in ("group", "batch"):
        config = ModelConfig(name, width=8, norm=norm)
        model = ModelSpec.of(config, num_classes=10, in_chans=3).build().train()
        difference[norm] = (model(images)[:2] - model(images[:2])).abs().max()
    assert difference["group"] < 1e-5
    assert difference["batch"] > 1e-2


def test_a_group_normalised_network_has_no_buffers() -> None:
    """No running statistics are left behind."""
    model = ModelSpec.of(ModelConfig("cifar_resnet8", norm="group"), num_classes=2, in_chans=1)
    assert list(model.build().buffers()) == []


@pytest.mark.parametrize("width", [4, 10, 12, 20])
def test_any_width_can_be_group_normalised(width: int) -> None:
    """Also one that is no multiple of eight."""
    config = ModelConfig("cifar_resnet8", width=width, norm="group")
    model = ModelSpec.of(config, num_classes=10, in_chans=1).build()
    assert model(torch.ones(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_name_is_a_network(name: str) -> None:
    """The names that error messages suggest exist."""
    assert find_network(name) is not None


@pytest.mark.parametrize(
    "name",
    [
        *("cifar_resnet2", "cifar_resnet21", "cifar_vgg12", "cifar_resnet", "resnet20"),
        *("cifar_vgg16x", "cifar_resnet101", "cifar_vgg18", "cifar_vgg_smal"),
        *("cifar_resnet_columns", "mlp2", "mpl"),
    ],
)
def test_other_names_are_no_cifar_network(name: str) -> None:
    """A depth that is not 6n + 2, an unknown VGG, or another family."""
    assert find_network(name) is None


# ---- the networks that are grown


def test_the_growing_networks_of_mnist_and_digits_read_all_pixels() -> None:
    """784 -> 128 of the paper's MNIST, 64 -> 128 of the digits, 128 -> 128 after that."""
    for side, pixels in ((28, 784), (8, 64)):
        config = ModelConfig("mlp", side=side, blocks=(3,))
        model = ModelSpec.of(config, num_classes=10, in_chans=1).build()
        shapes = [tuple(p.shape) for name, p in model.named_parameters() if "weight" in name]
        assert shapes == [(128, pixels), (128, 128), (128, 128), (10, 128)]
        (stage,) = stages(model)
        assert (stage.name, stage.num_blocks, stage.kind) == ("hidden", 3, "Unit")


@torch.no_grad()
def test_an_mlp_is_its_matrices_with_relu_between() -> None:
    spec = ModelSpec("mlp", 3, 2, {"side": 4, "width": 5, "blocks": [2]})
    model = spec.build()
    images = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x = images.flatten(1)
    for unit in model.get_submodule("hidden"):  # type: ignore[union-attr]
        x = (x @ unit.linear.weight.T + unit.linear.bias).clamp(min=0)
    expected = x @ model.get_parameter("fc.weight").T + model.get_parameter("fc.bias")
    torch.testing.assert_close(model(images), expected)


@torch.no_grad()
def test_an_mlp_averages_larger_images_and_refuses_smaller_ones() -> None:
    """The remedy is in the line; of images of its own size it reads each pixel."""
    spec = ModelSpec("mlp", 10, 1, {"side": 8})
    model, images = spec.build(), torch.rand(3, 1, 16, 24)
    assert isinstance(model, Mlp)
    torch.testing.assert_close(model(images), model(F.avg_pool2d(images, (2, 3))))
    with pytest.raises(UserError, match=r"'mlp' does not take .* 1x7x9: .*set model.side = 7"):
        require_shapes(model, "mlp", [(1, 7, 9)])


def test_the_growing_network_of_cifar_has_one_stage_of_like_blocks() -> None:
    """A 7x7 convolution to 8 channels, then basic blocks of 8 channels that change nothing else."""
    spec = ModelSpec.of(ModelConfig("cifar_resnet_column", blocks=(3,)), num_classes=10, in_chans=3)
    model = spec.build()
    assert isinstance(model, CifarColumn)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convolutions] == [(8, 3, 7, 7)] + [(8, 8, 3, 3)] * 6
    (stage,) = stages(model)
    assert (stage.name, stage.num_blocks, stage.kind) == ("blocks", 3, "BasicBlock")
    shapes: list[tuple[int, ...]] = []
    model.blocks.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 8, 32, 32)]


@pytest.mark.parametrize("name", ["mlp", "cifar_resnet_column"])
def test_a_growing_network_has_one_block_and_one_stage(name: str) -> None:
    (stage,) = stages(ModelSpec(name, 10, 1).outline())
    assert stage.num_blocks == 1
    with pytest.raises(UserError, match="give one number, it has one stage"):
        ModelSpec(name, 10, 1, {"blocks": [1, 2]}).build()


@torch.no_grad()
def test_a_basic_block_can_begin_as_its_shortcut() -> None:
    model = build("cifar_resnet8").eval()
    block = model.get_submodule("stages.0.0")
    assert isinstance(block, BasicBlock)
    block.zero_init_last()
    x = torch.rand(2, 16, 6, 6)
    assert torch.equal(block(x), x)


# ---- building


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_vgg11", "test_resnet"])
def test_a_seed_determines_all_weights(name: str) -> None:
    """Whatever the global generator did before; another seed gives other weights."""
    torch.manual_seed(1)
    first = build(name, seed=5)
    torch.manual_seed(2)
    torch.rand(100)
    assert equal_states(first, build(name, seed=5))
    assert not equal_states(first, build(name, seed=6))


@pytest.mark.parametrize("name", ["cifar_resnet8", "test_resnet"])
def test_building_leaves_the_global_generator_untouched(name: str) -> None:
    """What is drawn next does not depend on whether a model was built."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build(name, seed=5)
    assert torch.equal(torch.rand(4), expected)


def test_building_leaves_the_generators_of_the_devices_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No CUDA device is seeded."""
    seeded: list[int] = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeded.append)
    build("cifar_resnet8", seed=5)
    assert seeded == []


def test_a_failed_build_leaves_the_global_generator_untouched() -> None:
    """The same after an error."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with pytest.raises(UserError):
        ModelSpec("cifar_resnet8", 10, 3, {"height": 4}).build()
    assert torch.equal(torch.rand(4), expected)


@torch.no_grad()
def test_a_timm_model_is_built_by_its_name() -> None:
    """With the classes and channels of the data set and the options of the configuration."""
    config = ModelConfig("test_vit", drop_rate=0.25)
    spec = ModelSpec.of(config, num_classes=7, in_chans=1)
    assert spec == ModelSpec("test_vit", 7, 1, {"drop_rate": 0.25})
    model = spec.build().eval()
    assert type(model).__module__.startswith("timm.models")
    assert model(torch.zeros(2, 1, 160, 160)).shape == (2, 7)
    assert isinstance(model.head_drop, nn.Dropout)
    assert model.head_drop.p == 0.25


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "regnety_002", "skresnet18"])
@pytest.mark.parametrize("zero", [True, False])
def test_the_last_gain_of_a_block_begins_as_it_is_told(name: str, zero: bool) -> None:
    """... with zero, or with one as all others."""
    config = ModelConfig(name, zero_init_last=zero)
    model = ModelSpec.of(config, num_classes=2, in_chans=3).build()
    stage = stages(model)[0]
    block = model.get_submodule(stage.prefix(0).removesuffix("."))
    gains = [m.weight.max().item() for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (0.0 in gains) is zero
    assert {*gains} <= {0.0, 1.0}


def test_timm_itself_begins_with_zero() -> None:
    usual, told = (ModelSpec("resnet18", 2, 3, a).build(1) for a in ({}, {"zero_init_last": True}))
    assert equal_states(usual, told)


def test_a_spec_holds_only_the_options_that_were_set() -> None:
    """Defaults stay with the network."""
    config = ModelConfig("cifar_vgg16", norm="group")
    spec = ModelSpec.of(config, num_classes=100, in_chans=3)
    assert spec == ModelSpec("cifar_vgg16", 100, 3, {"norm": "group"})


def test_an_option_that_the_network_does_not_take_is_a_user_error() -> None:
    """timm's VGG has no stochastic depth, which shows only when it is built."""
    config = ModelConfig("vgg11", drop_path_rate=0.1)
    spec = ModelSpec.of(config, num_classes=10, in_chans=3)
    with pytest.raises(UserError, match=r"model vgg11: .*'drop_path_rate'"):
        spec.build()


# ---- the configuration


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnt18", "resnet18"),
        ("cifar_resnet_20", "cifar_resnet20"),
        ("cifar_vg16", "cifar_vgg16"),
        ("vit_base_patch16_244", "vit_base_patch16_224"),
    ],
)
def test_an_unknown_model_has_a_near_miss(name: str, near: str) -> None:
    """Among timm's models and the CIFAR networks."""
    message = f"name = '{name}' is no timm model and no CIFAR network; did you mean '{near}'?"
    with pytest.raises(ValueError, match="is no timm model") as caught:
        ModelConfig(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "regnetx_002", "width": 8}, "width is no option of regnetx_002"),
        ({"name": "resnet18", "norm": "group"}, "norm is no option of resnet18"),
        ({"drop_rate": 0.0}, "drop_rate is no option of cifar_resnet20"),
        ({"drop_path_rate": 0.1}, "drop_path_rate is no option of cifar_resnet20"),
        ({"zero_init_last": True}, "zero_init_last is no option of cifar_resnet20"),
        ({"name": "convnext_atto", "zero_init_last": False}, "is no option of convnext_atto"),
        (
            {"name": "resnet18", "zero_init_last": True, "activation": "sign"},
            "zero_init_last = True: no gradient passes it with activation = 'sign'",
        ),
        ({"norm": "layer"}, "norm = 'layer': must be one of batch, group"),
        ({"width": 0}, "width = 0: must be at least 1"),
        ({"name": "mlp", "side": 0}, "side = 0: must be at least 1"),
        ({"name": "mlp", "norm": "group"}, "norm is no option of mlp"),
        ({"name": "mlp", "drop_rate": 0.1}, "drop_rate is no option of mlp"),
        ({"side": 8}, "side is no option of cifar_resnet20"),
        ({"name": "resnet18", "side": 8}, "side is no option of resnet18"),
    ],
)
def test_an_option_that_does_not_belong_is_named(arguments: dict[str, Any], message: str) -> None:
    """Options of the CIFAR networks on a timm model, timm's on a CIFAR network, bad values."""
    with pytest.raises(ValueError, match=message):
        ModelConfig(**arguments)


@pytest.mark.parametrize("name", ["resnet50", "resnet50.a1_in1k", "cifar_resnet110"])
def test_known_names_are_accepted(name: str) -> None:
    """A timm model, one with the tag of its pretrained weights, a CIFAR network."""
    assert ModelConfig(name).name == name


# ---- blocks


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet18", (2, 3, 4, 3)),  # the ResNet-26 of 2103.16547, which is not timm's
        ("resnet50", (1, 1, 2, 1)),
        ("resnetv2_50", (1, 2, 3, 1)),
        ("convnext_atto", (1, 2, 3, 1)),
        ("vit_tiny_patch16_224", (5,)),
        ("cifar_resnet20", (1, 2, 4)),
        ("cifar_resnet18", (1, 2, 4, 1)),
        ("cifar_resnet_column", (4,)),
        ("mlp", (4,)),
    ],
)
def test_a_network_may_have_other_numbers_of_blocks(name: str, blocks: tuple[int, ...]) -> None:
    """... and its specification, which stands in tickets, holds them as JSON does."""
    spec = ModelSpec.of(ModelConfig(name, blocks=blocks), num_classes=10, in_chans=3)
    assert [stage.num_blocks for stage in stages(spec.outline())] == list(blocks)
    assert json.loads(json.dumps(spec.arguments)) == spec.arguments


def test_the_blocks_of_the_name_build_the_same_network() -> None:
    usual, named = (
        ModelSpec("resnet18", 10, 3, arguments).build(1)
        for arguments in ({}, {"blocks": [2, 2, 2, 2]})
    )
    assert equal_states(usual, named)


@pytest.mark.parametrize(
    ("name", "blocks", "problem"),
    [
        ("resnet18", [2, 3, 4], "it has 4 stages \\(layer1 2, layer2 2, layer3 2, layer4 2\\)"),
        ("cifar_resnet20", [1, 2], "give one number for each of 3 stages"),
        ("cifar_resnet18", [1, 2, 1], "give one number for each of 4 stages"),
        ("regnetx_002", [1, 1, 4, 8], "it takes no such list; leave model.blocks out"),
        ("vit_tiny_patch16_224", [5, 5], "it has 1 stages"),
    ],
)
def test_blocks_that_do_not_fit_are_one_line(name: str, blocks: list[int], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        ModelSpec(name, 10, 3, {"blocks": blocks}).build()


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        *(("cifar_vgg16", (1, 1, 1, 1, 1)), ("cifar_vgg_small", (1, 1, 1))),
        *(("resnet18", ()), ("resnet18", (0, 1, 1, 1))),
    ],
)
def test_a_wrong_number_of_blocks_is_refused(name: str, blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="blocks"):
        ModelConfig(name, blocks=blocks)


# ---- head and stem


@pytest.mark.parametrize(
    ("name", "head", "stem"),
    [
        ("cifar_resnet8", {"fc.weight", "fc.bias"}, {"conv1.weight"}),
        ("cifar_vgg_small", {"fc.weight", "fc.bias"}, {"stages.0.0.0.weight"}),
        ("mlp", {"fc.weight", "fc.bias"}, {"hidden.0.linear.weight"}),
        ("resnet18", {"fc.weight", "fc.bias"}, {"conv1.weight"}),
        ("test_vit", {"head.weight", "head.bias"}, {"patch_embed.proj.weight"}),
    ],
)
def test_head_and_stem_are_what_changes_with_classes_and_channels(
    name: str, head: set[str], stem: set[str]
) -> None:
    spec = ModelSpec(name, 10, 3)
    assert shaped_by(spec, "num_classes") == head
    assert shaped_by(spec, "in_chans") == stem
