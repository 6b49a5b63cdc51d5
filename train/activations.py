"""The sign as an activation: networks whose convolutions, after the stem, read only -1 and +1.

As in the multi-prize tickets with binary activations (Diffenderfer and Kailkhura 2021, 2103.09377)
and the other papers of binary networks. The CIFAR networks are built with it, a timm ResNet is
turned into this form after it was built.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

SIGN_TAKERS = "CIFAR networks and timm's plain ResNets of basic blocks (resnet18, resnet34)"


def sign(x: Tensor) -> Tensor:
    """-1 or +1 in the type of `x`; +1 for 0 and -0. What is not a number stays so, to be seen."""
    return torch.where(x >= 0, 1.0, x.clamp(-1, -1))  # clamp, as it leaves NaN alone


class _ApproximateSign(torch.autograd.Function):
    """The sign, with the gradient of a curve of two parabolas, x (2 - |x|) within -1 and 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = 2 * (1 - x.clamp(-1, 1).abs())
        return gradients[0] * slope


class Sign(nn.Module):
    """`sign`, element by element; its gradient is `g * 2 * (1 - |clamp(x, -1, 1)|)`.

    This is the approximate sign of Bi-Real Net (Liu et al. 2018, 1808.00278).
    """

    def forward(self, x: Tensor) -> Tensor:
        """The signs of `x`, of its shape: +1 and -1, +1 at 0."""
        if not torch.is_grad_enabled():
            return sign(x)  # plain operations: no exporter has to know of the gradient
        signs: Tensor = _ApproximateSign.apply(x)
        return signs


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "sign": Sign}


def check_activation(name: object) -> None:
    """Raises `ValueError` unless there is such an activation, whoever wrote the name."""
    if name not in tuple(ACTIVATIONS):
        raise ValueError(f"activation = {name!r:.40}: must be one of {', '.join(ACTIVATIONS)}")


def is_plain_resnet(model: nn.Module) -> TypeGuard[ResNet]:
    """Whether nothing but convolutions, normalisations and sums is between its activations.

    So of timm's ResNets with basic blocks those are not which have activations in their stem,
    attention, or average pooling in a shortcut or before a convolution.
    """
    if type(model) is not ResNet:
        return False
    simple = isinstance(model.conv1, nn.Conv2d) and isinstance(model.maxpool, nn.MaxPool2d)
    return simple and all(map(_is_plain, _blocks(model)))


def with_sign(model: nn.Module) -> nn.Module:
    """The model itself, a timm ResNet of basic blocks, with `Sign` for its activations.

    The stem is then conv-norm-pool-sign, since a sign before the max-pool would leave it nothing
    but ties; a block is conv-norm-sign-conv-norm-(+ shortcut)-sign. The names of its tensors stay.
    Raises `ValueError` for any other network. A block whose last normalisation starts at zero
    (timm's `zero_init_last`) and whose shortcut is the identity has no gradient: 0 +- 1 is where
    that of the sign ends.
    """
    if not is_plain_resnet(model):
        raise ValueError(f"activation: only {SIGN_TAKERS} take one")
    model.act1, model.maxpool = nn.Identity(), nn.Sequential(model.maxpool, Sign())
    for block in _blocks(model):
        block.act1, block.act2 = Sign(), Sign()
    return model


def _blocks(model: ResNet) -> list[nn.Module]:
    return [block for n in (1, 2, 3, 4) for block in model.get_submodule(f"layer{n}").children()]


def _is_plain(block: nn.Module) -> bool:
    if not isinstance(block, BasicBlock) or block.se is not None:
        return False
    straight = block.downsample is None or isinstance(next(block.downsample.children()), nn.Conv2d)
    return straight and isinstance(block.aa, nn.Identity)
