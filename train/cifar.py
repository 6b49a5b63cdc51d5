"""The small networks of the lottery-ticket papers, for images of 8 to 64 pixels.

`cifar_resnet{6n+2}`: three stages of n basic blocks (He et al. 2016, 1512.03385, section 4.2),
with a 1x1 convolution where a shortcut changes shape, as in Frankle et al.
`cifar_resnet{18,34}`: the four stages of the ImageNet networks behind a 3x3 convolution.
`cifar_vgg{11,13,16,19}`: 3x3 convolutions with batch normalisation and one linear layer (Simonyan
and Zisserman, 1409.1556).
`cifar_vgg_small`: the VGG-Small of the papers on binary networks, whose one linear layer reads a
map of 4x4 (as in IR-Net, Qin et al. 2020, 1909.10788).
`cifar_resnet_column`: one stage of basic blocks, all alike, behind a 7x7 convolution, to be grown
(Recursive growth, 2109.03862: 8 channels).
All take images of any size, and on request a normalisation that does not depend on the batch, or
the sign for an activation. Each activation comes after the pooling, and before the next
convolution: for ReLU that is as good as the other order, for the sign only this has a gradient.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from train.activations import ACTIVATIONS

Norm = Callable[[int], nn.Module]

RESNET_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
NORMS: dict[str, Norm] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(_num_groups(channels), channels),
}


def _num_groups(channels: int) -> int:
    """Groups of about 16 channels, which divide them evenly (Wu and He 2018, 1803.08494)."""
    return math.gcd(channels, max(1, channels // 16))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(
        self, in_channels: int, channels: int, *, stride: int, norm: Norm, activation: str
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = norm(channels)
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = norm(channels)
        self.act2 = ACTIVATIONS[activation]()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """`x: [N, C, H, W]` -> `[N, C', H', W']`."""
        out = self.act1(self.norm1(self.conv1(x)))
        summed: Tensor = self.act2(self.norm2(self.conv2(out)) + self.shortcut(x))
        return summed

    def zero_init_last(self) -> None:
        """Leaves of the block its shortcut, as timm's blocks do."""
        nn.init.zeros_(self.norm2.get_parameter("weight"))


class CifarResNet(nn.Module):
    """`[N, in_chans, H, W]` to `[N, num_classes]` through stages of `width`, 2 `width`, ...

    `num_blocks` are those of each stage by the network's name, in whose place `blocks` may be
    given.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        *,
        num_classes: int,
        in_chans: int = 3,
        width: int = 16,
        norm: str = "batch",
        activation: str = "relu",
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if blocks is not None and len(blocks) != len(num_blocks):
            raise ValueError(
                f"blocks = {list(blocks)}: give one number for each of {len(num_blocks)} stages"
            )
        make_norm = NORMS[norm]
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.norm1 = make_norm(width)
        self.act1 = ACTIVATIONS[activation]()
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(num_blocks if blocks is None else blocks):
            out = width << stage
            units: list[nn.Module] = []
            for block in range(count):
                stride = 2 if stage and not block else 1
                unit = partial(BasicBlock, stride=stride, norm=make_norm, activation=activation)
                units.append(unit(channels, out))
                channels = out
            stages.append(nn.Sequential(*units))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """`x: [N, C, H, W]` -> logits `[N, num_classes]`."""
        out = self.stages(self.act1(self.norm1(self.conv1(x))))
        scores: Tensor = self.fc(out.mean((2, 3)))
        return scores


class CifarColumn(nn.Module):
    """`[N, in_chans, H, W]` to `[N, num_classes]` through one stage of blocks of one size.

    It has at least one block: a network of none would have stem and classifier alone, and nothing
    to prune where these are left dense.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_chans: int = 3,
        width: int = 8,
        norm: str = "batch",
        activation: str = "relu",
        blocks: Sequence[int] = (1,),
    ) -> None:
        super().__init__()
        (count,) = one_stage(blocks)
        make_norm = NORMS[norm]
        self.conv1 = nn.Conv2d(in_chans, width, 7, 1, 3, bias=False)
        self.norm1 = make_norm(width)
        self.act1 = ACTIVATIONS[activation]()
        block = partial(BasicBlock, stride=1, norm=make_norm, activation=activation)
        self.blocks = nn.Sequential(*(block(width, width) for _ in range(count)))
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """`x: [N, C, H, W]` -> logits `[N, num_classes]`."""
        out = self.blocks(self.act1(self.norm1(self.conv1(x))))
        scores: Tensor = self.fc(out.mean((2, 3)))
        return scores


class CifarVgg(nn.Module):
    """`[N, in_chans, H, W]` to `[N, num_classes]`; a 2x2 max-pool between the five stages."""

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        in_chans: int = 3,
        width: int = 64,
        norm: str = "batch",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels = [width * min(8, 1 << stage) for stage in range(5)]
        self.stages = _vgg_stages(in_chans, channels, VGG_STAGES[depth], NORMS[norm], activation)
        self.act = ACTIVATIONS[activation]()
        self.fc = nn.Linear(channels[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """`x: [N, C, H, W]` -> logits `[N, num_classes]`."""
        *inner, last = self.stages
        for stage in inner:
            x = self.act(_halved(stage(x)))
        scores: Tensor = self.fc(self.act(last(x)).mean((2, 3)))
        return scores


class CifarVggSmall(nn.Module):
    """`[N, in_chans, H, W]` to `[N, num_classes]`; a 2x2 max-pool after each of three stages.

    The linear layer reads a map of 4x4, which images of 32x32 pixels end in; that of others is
    max-pooled to it, which leaves signs what they are.
    """

    _SIDE = 4

    def __init__(
        self,
        *,
        num_classes: int,
        in_chans: int = 3,
        width: int = 128,
        norm: str = "batch",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels = [width, 2 * width, 4 * width]
        self.stages = _vgg_stages(in_chans, channels, (2, 2, 2), NORMS[norm], activation)
        self.act = ACTIVATIONS[activation]()
        self.fc = nn.Linear(channels[-1] * self._SIDE**2, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """`x: [N, C, H, W]` -> logits `[N, num_classes]`."""
        *inner, last = self.stages
        for stage in inner:
            x = self.act(_halved(stage(x)))
        x = self.act(_pooled(_halved(last(x)), self._SIDE))
        scores: Tensor = self.fc(x.flatten(1))
        return scores


def _vgg_stages(
    in_chans: int, channels: Sequence[int], num_convs: Sequence[int], norm: Norm, activation: str
) -> nn.ModuleList:
    """Stages of 3x3 convolutions. A stage ends before its activation, which is the network's."""
    stages: list[nn.Module] = []
    for out, count in zip(channels, num_convs, strict=True):
        units: list[nn.Sequential] = []
        for _ in range(count):
            conv = nn.Conv2d(in_chans, out, 3, 1, 1, bias=False)
            units.append(nn.Sequential(conv, norm(out), ACTIVATIONS[activation]()))
            in_chans = out
        del units[-1][-1]
        stages.append(nn.Sequential(*units))
    return nn.ModuleList(stages)


def _halved(x: Tensor) -> Tensor:
    """Max-pooled to half its size, unless it is but one pixel high or wide."""
    return F.max_pool2d(x, 2) if min(x.shape[-2:]) > 1 else x


def _pooled(x: Tensor, side: int) -> Tensor:
    """Max-pooled to `side` x `side`."""
    height, width = x.shape[-2:]
    if height % side or width % side:
        return F.adaptive_max_pool2d(x, side)
    return F.max_pool2d(x, (height // side, width // side))  # the same, and known to ONNX


def initialise(model: nn.Module) -> None:
    """He normal (fan in) for every convolution and linear weight, as in Frankle et al."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def one_stage(blocks: Sequence[int]) -> Sequence[int]:
    """`blocks` of a network of one stage. Raises `ValueError` for those of several."""
    if len(blocks) != 1:
        raise ValueError(f"blocks = {list(blocks)}: give one number, it has one stage")
    return blocks


def find_network(name: str) -> Callable[..., nn.Module] | None:
    """The constructor of `cifar_resnet20` or `cifar_vgg16`, without its depth; else `None`."""
    if name in _WITHOUT_DEPTH:
        return _WITHOUT_DEPTH[name]
    match = re.fullmatch(r"cifar_(resnet|vgg)(\d{1,4})", name)
    if match is None:
        return None
    depth = int(match[2])
    if match[1] == "vgg":
        return partial(CifarVgg, depth) if depth in VGG_STAGES else None
    if depth in RESNET_STAGES:
        return partial(CifarResNet, RESNET_STAGES[depth], width=64)
    if depth >= 8 and depth % 6 == 2:
        return partial(CifarResNet, [(depth - 2) // 6] * 3)
    return None


_WITHOUT_DEPTH: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet_column": CifarColumn,
    "cifar_vgg_small": CifarVggSmall,
}
EXAMPLES = (
    *(f"cifar_resnet{depth}" for depth in (8, 14, 18, 20, 32, 34, 44, 56, 110)),
    *(f"cifar_vgg{depth}" for depth in VGG_STAGES),
    *_WITHOUT_DEPTH,
)
