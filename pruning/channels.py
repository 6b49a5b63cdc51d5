"""Channels, which are kept or go whole: where a network has them, how they rank, what goes too.

An output channel of a convolution is scaled by the batch normalisation right after it, so that the
size of the scale, `|gamma|`, says how much the channel matters (network slimming, Liu et al. 2017,
1708.06519). With a channel go its filter and its scale and shift, so that it is exactly zero for
every image, whatever the running statistics are; and, in all layers that read it, the weights that
then multiply zeros alone. So a ticket's density counts what a network of the kept channels would
have. In a residual network a channel is zero only if all that is added to it is.

Choices where the paper leaves them open: every layer keeps its best channel; ties are kept in
layer order, then by their place.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from data.errors import UserError
from pruning.allocate import keep_count
from pruning.densities import count_for, exact
from pruning.masks import Masks, maskable, prunable
from pruning.packing import Shape
from train.activations import Sign
from train.basis import LAYERS
from train.optim import NORMALISATIONS

Of = Literal["channels", "weights"]
_SCALING = (nn.BatchNorm2d, nn.SyncBatchNorm)


def scaled_layers(model: nn.Module) -> dict[str, str]:
    """The convolutions whose output channels are scaled: their weight -> the scale's name.

    That is by the batch normalisation that follows right after them in the same module, in layer
    order. Raises `UserError` for a network without any, with other normalisations, whose channels
    depend on each other, or with signs, after which a channel of zeros is one of ones.
    """
    names: dict[Tensor, str] = {one: name for name, one in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, NORMALISATIONS) and not isinstance(module, _SCALING):
            raise UserError(
                f"channels are ranked by the scales of batch normalisations, and {name} is a "
                f"{type(module).__name__}: choose a network (or model.norm) with nothing else"
            )
        if isinstance(module, Sign):
            raise UserError(
                "after the sign a channel of zeros is one of ones, and cannot go: choose another "
                "model.activation"
            )
    found = {
        names[layer.weight]: names[norm.weight]
        for module in model.modules()
        for layer, norm in pairwise(module.children())
        if isinstance(layer, nn.Conv2d)
        and isinstance(norm, _SCALING)
        and norm.affine
        and norm.num_features == layer.out_channels
    }
    if not found:
        raise UserError("no convolution is followed by a batch normalisation that ranks channels")
    return {name: found[name] for name in prunable(model) if name in found}


def count_channels(density: float, num_channels: int, num_layers: int) -> int:
    """`density` of all channels, rounded to the nearest. Raises `UserError` for less than one a
    layer, or a density outside (0, 1]."""
    count = count_for(density, num_channels)
    if count < num_layers:
        raise UserError(
            f"density = {density} keeps {count} of {num_channels} channels, which is less than one "
            f"in each of {num_layers} layers: keep at least {num_layers / num_channels:.4f}"
        )
    return count


def keep_channels(scores: Mapping[str, Tensor], count: int) -> Masks:
    """Masks of the `count` highest scores over all layers, and of each layer at least the best.

    `scores`: `[channels]` of each layer. Raises `ValueError` for a score that is not finite, or for
    fewer channels than layers.
    """
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise ValueError(f"{name} is not finite")
    if count < len(scores):
        raise ValueError(f"cannot keep {count} channels in {len(scores)} layers")
    first = {name: s.index_fill(0, s.argmax(), math.inf) for name, s in scores.items()}
    return keep_count(first, count)


class Channels:
    """The channels of a network, of which it has a copy of its own, on the CPU, to try masks on.

    `image_shape: (C, H, W)` is that of the images. Masks of channels are `[channels]` by the name
    of the scale. Raises `UserError` as `scaled_layers`.
    """

    def __init__(self, model: nn.Module, image_shape: Shape) -> None:
        self.layers = scaled_layers(model)
        self._parameters = maskable(model)
        self.shapes = {name: tuple(self._parameters[name].shape) for name in self.layers.values()}
        self._model, self._image = model.eval(), torch.ones(1, *image_shape)
        self._reads: dict[str, Tensor] = {}
        _make_positive(model)
        names: dict[Tensor, str] = {one: name for name, one in self._parameters.items()}
        for layer in model.modules():
            if isinstance(layer, LAYERS) and layer.weight in names:
                layer.register_forward_pre_hook(partial(self._look, names[layer.weight]))

    @property
    def num_channels(self) -> int:
        """Of all layers."""
        return sum(map(math.prod, self.shapes.values()))

    def scores(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`|gamma|` of all channels, on the CPU, from a state of the network or its parameters."""
        return {name: state[name].detach().abs().float().cpu() for name in self.shapes}

    def keep(self, scores: Mapping[str, Tensor], density: float, of: Of) -> Masks:
        """The best channels: a fraction of the channels, or as many as make `masks` no denser.

        Raises `UserError` where that is less than one channel in each layer, `ValueError` as
        `keep_channels`.
        """
        if of == "channels":
            count = count_channels(density, self.num_channels, len(self.shapes))
            return keep_channels(scores, count)
        counts = range(len(self.shapes), self.num_channels + 1)
        size = sum(parameter.numel() for parameter in self._parameters.values())

        def num_kept(count: int) -> int:
            return self.masks(keep_channels(scores, count)).kept

        num_fitting = bisect_right(counts, math.floor(exact(density) * size), key=num_kept)
        if not num_fitting:
            least = num_kept(counts[0])
            raise UserError(
                f"density = {density}: one channel in each of {len(self.shapes)} layers takes "
                f"{least} of {size} weights: keep at least {math.ceil(least / size * 1e4) / 1e4}"
            )
        return keep_channels(scores, counts[num_fitting - 1])

    def masks(self, kept: Masks) -> Masks:
        """The masks of all weights: of convolutions, linear layers, and normalisations."""
        masks = {
            name: torch.ones(parameter.shape, dtype=torch.bool)
            for name, parameter in self._parameters.items()
        }
        for layer, scale in self.layers.items():
            masks[layer] &= _over(masks[layer], kept[scale])
            for name in (scale, _shift_of(scale)):
                masks[name] &= kept[scale]
        for name, reads in self._reading(masks).items():
            masks[name] &= reads
        return Masks(masks)

    @torch.no_grad()
    def _reading(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each weight whether it multiplies anything but zeros, in a shape that broadcasts.

        All weights and the image are positive, so that nothing but a channel that is gone is zero.
        """
        for scale in self.shapes:
            for name in (scale, _shift_of(scale)):
                self._parameters[name].copy_(masks[name])
        self._reads = {}
        self._model(self._image)
        return self._reads

    def _look(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Notes which weights of a layer read zeros, at every call of it."""
        dim = -1 if isinstance(layer, nn.Linear) else 1
        live = (inputs[0] != 0).movedim(dim, 0).flatten(1).any(1)
        shape, groups = self._parameters[name].shape, getattr(layer, "groups", 1)
        reads = live.view(groups, -1).repeat_interleave(shape[0] // groups, 0)  # [out, in / groups]
        reads = reads.view(*reads.shape, *[1] * (len(shape) - 2))
        self._reads[name] = reads | self._reads.get(name, torch.zeros_like(reads))


def _shift_of(scale: str) -> str:
    """The name of beta by that of gamma."""
    return scale.removesuffix("weight") + "bias"


def _over(weight: Tensor, channels: Tensor) -> Tensor:
    """`[channels]` in a shape that broadcasts over a weight's output channels."""
    return channels.view(-1, *[1] * (weight.ndim - 1))


@torch.no_grad()
def _make_positive(model: nn.Module) -> None:
    """Gives a fresh network weights with which every channel is positive, and none overflows."""
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.fill_(1 / fan_in)
