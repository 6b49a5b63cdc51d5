"""The small networks of the lottery-ticket papers, for images of 8 to 64 pixels.

`cifar_resnet{6n+2}`: three stages of n basic blocks (He et al. 2016, 1512.03385, section 4.2),
with a 1x1 convolution where a shortcut changes shape, as in Frankle et al.
`cifar_vgg{11,13,16,19}`: 3x3 convolutions with batch normalisation and one linear layer (Simonyan
and Zisserman, 1409.1556).
Both take images of any size, and a normalisation that does not depend on the batch on request.
"""

import math
import re
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]

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

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = norm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """`[N, in_chans, H, W]` to `[N, num_classes]` through stages of `width`, 2 and 4 `width`.

    `blocks` gives each stage's number of blocks, in place of those of the depth.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        in_chans: int = 3,
        width: int = 16,
        norm: str = "batch",
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        make_norm = NORMS[norm]
        num_blocks = [(depth - 2) // 6] * 3 if blocks is None else blocks
        if len(num_blocks) != 3:
            raise ValueError(f"blocks = {list(num_blocks)}: give one number for each of 3 stages")
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.norm1 = make_norm(width)
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            out = width << stage
            units: list[nn.Module] = []
            for block in range(num_blocks[stage]):
                stride = 2 if stage and not block else 1
                units.append(BasicBlock(channels, out, stride=stride, norm=make_norm))
                channels = out
            stages.append(nn.Sequential(*units))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stages(F.relu(self.norm1(self.conv1(x))))
        pooled: Tensor = self.fc(out.mean((2, 3)))
        return pooled


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
    ) -> None:
        super().__init__()
        make_norm = NORMS[norm]
        stages: list[nn.Module] = []
        channels = in_chans
        for stage, num_convs in enumerate(VGG_STAGES[depth]):
            out = width * min(8, 1 << stage)
            units: list[nn.Module] = []
            for _ in range(num_convs):
                conv = nn.Conv2d(channels, out, 3, 1, 1, bias=False)
                units.append(nn.Sequential(conv, make_norm(out), nn.ReLU()))
                channels = out
            stages.append(nn.Sequential(*units))
        self.stages = nn.ModuleList(stages)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        for index, stage in enumerate(self.stages):
            if index and min(x.shape[-2:]) > 1:
                x = F.max_pool2d(x, 2)
            x = stage(x)
        pooled: Tensor = self.fc(x.mean((2, 3)))
        return pooled


def _initialise(model: nn.Module) -> None:
    """He normal (fan in) for every convolution and linear weight, as in Frankle et al."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def find_network(name: str) -> Callable[..., nn.Module] | None:
    """The constructor of `cifar_resnet20` or `cifar_vgg16`, without its depth; else `None`."""
    match = re.fullmatch(r"cifar_(resnet|vgg)(\d{1,4})", name)
    if match is None:
        return None
    depth = int(match[2])
    if match[1] == "vgg" and depth in VGG_STAGES:
        return lambda **arguments: CifarVgg(depth, **arguments)
    if match[1] == "resnet" and depth >= 8 and depth % 6 == 2:
        return lambda **arguments: CifarResNet(depth, **arguments)
    return None


EXAMPLES = (
    *(f"cifar_resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *(f"cifar_vgg{depth}" for depth in VGG_STAGES),
)
