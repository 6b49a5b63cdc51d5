"""Binary activations: the sign and its gradient, and the networks that are built with it."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from train.activations import Sign, is_plain_resnet, sign, with_sign
from train.cifar import CifarResNet, CifarVgg, CifarVggSmall
from train.models import ModelConfig, ModelSpec
from train.stages import stages

# x, its sign, the gradient there
TRUTH = (
    (-math.inf, -1, 0),
    (-3.0, -1, 0),
    (-1.0, -1, 0),
    (-0.75, -1, 0.5),
    (-0.25, -1, 1.5),
    (-0.0, 1, 2),
    (0.0, 1, 2),
    (0.5, 1, 1),
    (1.0, 1, 0),
    (1.25, 1, 0),
    (math.inf, 1, 0),
)

SIGNED = {
    "cifar_resnet8": 32,
    "cifar_resnet18": 32,
    "cifar_vgg_small": 32,
    "cifar_vgg11": 32,
    "resnet18": 64,
}
"""networks and the sides of their images"""


def build(name: str, **arguments: Any) -> nn.Module:
    """A narrow network, in training mode."""
    return ModelSpec(name, 10, 3, {"width": 8, **arguments}).build(1).train()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether types and values are equal."""
    return one.dtype == other.dtype and torch.equal(one, other)


# ---- the sign


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_truth_table_of_the_sign(dtype: torch.dtype) -> None:
    """Values in the type of the input, gradients 2 (1 - |x|) within -1 and 1 and 0 beyond."""
    x, signs, slopes = (torch.tensor(column, dtype=dtype) for column in zip(*TRUTH, strict=True))
    x.requires_grad_()
    found = Sign()(x)
    assert equal(found, signs)
    found.backward(torch.full_like(found, 3))
    assert x.grad is not None
    assert equal(x.grad, 3 * slopes)


@torch.no_grad()
def test_without_gradients_the_sign_is_the_same() -> None:
    x, signs, _ = (torch.tensor(column) for column in zip(*TRUTH, strict=True))
    assert equal(Sign()(x), signs.float())


@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_not_a_number_stays_so(gradients: bool) -> None:
    """A network that has diverged must not look healthy, nor must its gradient."""
    x = torch.tensor([math.nan, 2.0], requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        found = Sign()(x)
    assert found.isnan().tolist() == [True, False]
    if gradients:
        found.sum().backward()
        assert x.grad is not None
        assert x.grad.isnan().tolist() == [True, False]


def test_the_gradient_is_that_of_two_parabolas() -> None:
    """x (2 - |x|) within -1 and 1: its differences over a small step, at points without a bend."""
    x = torch.linspace(-1.5, 1.5, 100, dtype=torch.float64, requires_grad=True)

    def curve(at: Tensor) -> Tensor:
        inside = at.clamp(-1, 1)
        return inside * (2 - inside.abs())

    (found,) = torch.autograd.grad(Sign()(x).sum(), x)
    step = 1e-6
    expected = (curve(x + step) - curve(x - step)) / (2 * step)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)


def test_a_compiled_sign_has_the_same_gradient() -> None:
    """In one graph."""
    x, _, slopes = (torch.tensor(column) for column in zip(*TRUTH, strict=True))
    x.requires_grad_()
    torch.compile(Sign(), fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert x.grad is not None
    assert equal(x.grad, slopes)


def test_the_sign_keeps_the_order_of_memory() -> None:
    """Images whose channels come last stay so."""
    x = images(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    assert sign(x).is_contiguous(memory_format=torch.channels_last)


# ---- networks with it


@pytest.mark.parametrize("name", SIGNED)
def test_all_convolutions_but_the_first_read_signs(name: str) -> None:
    """... those of the shortcuts as well, in training and evaluation."""
    model = build(name, activation="sign")
    first, *others = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    read: dict[nn.Module, Tensor] = {}
    for conv in (first, *others):
        conv.register_forward_pre_hook(lambda m, args: read.update({m: args[0].detach()}))
    for mode in (True, False):
        model.train(mode)(images(2, 3, SIGNED[name], SIGNED[name]))
        assert all(set(read[conv].unique().tolist()) == {-1.0, 1.0} for conv in others)
        assert len(read[first].unique()) > 2


def test_the_classifier_of_vgg_small_reads_signs() -> None:
    """Of any image: one that is no multiple of 32 is pooled before the last sign."""
    model = build("cifar_vgg_small", activation="sign")
    assert isinstance(model, CifarVggSmall)
    read: list[Tensor] = []
    model.fc.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    for side in (32, 64, 20, 1):
        model(images(2, 3, side, side))
    assert [x.shape for x in read] == [(2, 32 * 16)] * 4
    assert all(bool((x.abs() == 1).all()) for x in read)


@pytest.mark.parametrize("name", SIGNED)
def test_a_gradient_reaches_all_weights(name: str) -> None:
    """The last normalisation of no block starts at zero, as it does in timm's ResNets else."""
    model = build(name, activation="sign")
    model(images(4, 3, SIGNED[name], SIGNED[name])).square().sum().backward()
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    assert all(p.grad is not None and bool(p.grad.any()) for p in weights.values())


@pytest.mark.parametrize(
    ("name", "sides"), [("cifar_vgg11", [16, 8, 4, 2, 2]), ("cifar_vgg_small", [16, 8, 4])]
)
def test_a_vgg_pools_before_the_sign(name: str, sides: list[int]) -> None:
    """The activation after each stage reads the smaller map, and its values are no signs yet."""
    model = build(name, activation="sign")
    assert isinstance(model, CifarVgg | CifarVggSmall)
    read: list[Tensor] = []
    model.act.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    model(images(2, 3, 32, 32))
    assert [x.shape[-1] for x in read] == sides
    assert all(len(x.unique()) > 2 for x in read)


def order(module: nn.Module, x: Tensor) -> list[str]:
    """The names of the modules without children in the order in which they are called."""
    called: list[str] = []
    for name, leaf in module.named_modules():
        if next(leaf.children(), None) is None:
            leaf.register_forward_hook(lambda m, args, out, name=name: called.append(name))
    module(x)
    return called


def test_the_order_of_a_basic_block() -> None:
    """conv, norm, sign, conv, norm, (+ shortcut,) sign."""
    model = build("cifar_resnet8", activation="sign")
    assert isinstance(model, CifarResNet)
    parts = ["conv1", "norm1", "act1", "conv2", "norm2", "shortcut.0", "shortcut.1", "act2"]
    block = model.get_submodule("stages.1.0")
    assert order(block, images(2, 8, 8, 8)) == parts
    assert isinstance(block.act1, Sign)
    assert isinstance(block.act2, Sign)


def test_the_order_of_a_timm_resnet() -> None:
    """In the stem the sign follows the pooling, where a ReLU was before."""
    model = build("resnet18", activation="sign")
    called = order(model, images(2, 3, 64, 64))
    assert called[:5] == ["conv1", "bn1", "act1", "maxpool.0", "maxpool.1"]
    assert isinstance(model.act1, nn.Identity)
    signs = [name for name, module in model.named_modules() if isinstance(module, Sign)]
    places = [f"layer{i}.{j}.act{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]
    assert signs == ["maxpool.1", *places]
    assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]
    block = ["conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2"]
    block += ["downsample.0", "downsample.1", "act2"]
    assert [n for n in called if "layer2.0." in n] == [f"layer2.0.{part}" for part in block]


@pytest.mark.parametrize("name", SIGNED)
def test_an_activation_holds_no_tensors(name: str) -> None:
    """Names and shapes are those of the network with ReLU, and so are its stages."""
    usual, signed = (build(name, activation=activation) for activation in ("relu", "sign"))
    shapes = [[(n, v.shape) for n, v in m.state_dict().items()] for m in (usual, signed)]
    assert shapes[0] == shapes[1]
    assert stages(usual) == stages(signed)


@pytest.mark.parametrize("name", SIGNED)
def test_relu_by_name_is_the_network_without_the_option(name: str) -> None:
    x = images(2, 3, SIGNED[name], SIGNED[name])
    usual, named = build(name), build(name, activation="relu")
    assert str(usual) == str(named)
    assert equal(usual(x), named(x))


def test_the_sign_of_wide_and_shallow_timm_resnets() -> None:
    """All options at once; the fresh weights of a block's last normalisation are not zero."""
    config = ModelConfig("resnet34", width=16, blocks=(1, 2, 1, 1), activation="sign")
    spec = ModelSpec.of(config, num_classes=10, in_chans=3)
    assert spec.arguments == {"width": 16, "blocks": [1, 2, 1, 1], "activation": "sign"}
    model = spec.build()
    assert [stage.num_blocks for stage in stages(model)] == [1, 2, 1, 1]
    assert bool(model.get_parameter("layer2.1.bn2.weight").all())
    assert sum(isinstance(m, Sign) for m in model.modules()) == 1 + 2 * 5


# ---- the networks with ReLU are what they were before there was a choice


def resnet_by_hand(model: CifarResNet, x: Tensor) -> Tensor:
    x = F.relu(model.norm1(model.conv1(x)))
    for block in (block for stage in model.stages for block in stage.children()):
        out = F.relu(block.norm1(block.conv1(x)))
        x = F.relu(block.norm2(block.conv2(out)) + block.shortcut(x))
    return model.fc(x.mean((2, 3)))


def vgg_by_hand(model: CifarVgg, x: Tensor) -> Tensor:
    for index, stage in enumerate(model.stages):
        if index and min(x.shape[-2:]) > 1:
            x = F.max_pool2d(x, 2)
        for unit in stage.children():
            conv, norm, *_ = unit.children()
            x = F.relu(norm(conv(x)))
    return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_resnet14", "cifar_vgg11", "cifar_vgg16"])
@pytest.mark.parametrize("size", [(32, 32), (13, 20), (1, 1)])
def test_with_relu_the_order_of_pooling_changes_no_bit(name: str, size: tuple[int, int]) -> None:
    """Neither of the scores, in training mode, nor of the gradients and running statistics."""
    model = build(name)
    twin, x = copy.deepcopy(model), images(3, 3, *size)
    scores = model(x)
    by_hand = resnet_by_hand(twin, x) if isinstance(twin, CifarResNet) else vgg_by_hand(twin, x)
    scores.square().sum().backward()
    by_hand.square().sum().backward()
    assert equal(scores, by_hand)
    found, expected = ([*(p.grad for p in m.parameters()), *m.buffers()] for m in (model, twin))
    assert all(equal(*pair) for pair in zip(found, expected, strict=True))


# ---- what is refused

UNFIT = [
    "resnet50",
    "resnet18d",
    "resnet10t",
    "seresnet18",
    "skresnet18",
    "test_vit",
    "regnetx_002",
]


@pytest.mark.parametrize("activation", ["relu", "sign"])
@pytest.mark.parametrize("name", UNFIT)
def test_an_activation_is_refused_where_it_cannot_be_chosen(name: str, activation: str) -> None:
    """By the configuration, and where a ticket of anyone has it, in one line each."""
    possible = "only CIFAR networks and timm's plain ResNets of basic blocks"
    with pytest.raises(ValueError, match=f"activation is no option of {name}: {possible}"):
        ModelConfig(name, activation=activation)
    with pytest.raises(UserError, match=f"model {name}: activation = '{activation}': {possible}"):
        ModelSpec(name, 10, 3, {"activation": activation}).build()


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18"])
def test_an_unknown_activation_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="activation = 'tanh': must be one of relu, sign"):
        ModelConfig(name, activation="tanh")
    for value in ("tanh", None, ["sign"]):
        with pytest.raises(ValueError, match=r"activation = .*: must be one of relu, sign"):
            ModelSpec(name, 10, 3, {"activation": value})


def test_other_models_are_not_turned_and_stay_as_they_are() -> None:
    """A ResNet of bottlenecks, and one that was turned already."""
    for model in (timm.create_model("resnet26"), build("resnet18", activation="sign")):
        assert not is_plain_resnet(model)
        before = str(model)
        with pytest.raises(ValueError, match="activation: only CIFAR networks and timm's plain"):
            with_sign(model)
        assert str(model) == before


def test_timms_own_option_is_left_alone() -> None:
    """`act_layer`, in the arguments of a ticket."""
    model = ModelSpec("resnet18", 10, 3, {"act_layer": "gelu"}).build()
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 0
    assert sum("GELU" in type(m).__name__ for m in model.modules()) == 1 + 2 * 8
