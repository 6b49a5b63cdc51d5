"""A multi-prize ticket run as bits: layers whose inputs are signs count bits of packed words."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.errors import UserError
from pruning.multiprize import GainLayer
from pruning.prizes import Prize
from pruning.xnor import PackedConv2d, PackedLinear


def packed_model(prize: Prize, images: Tensor) -> nn.Module:
    """The network, on the CPU and in evaluation mode, with the same outputs to the last bit.

    Packed are the layers whose inputs are +1 and -1 alone, as `images: [N, C, H, W]` tell: in a
    network with binary activations all but the first and, where its input is averaged, the
    last. Raises `UserError` where there are none.
    """
    model = prize.build_model()
    packed = {name: one for name, one in _reading_signs(model, images).items() if _can_pack(one)}
    if not packed:
        raise UserError(
            "no layer of this network reads signs alone: only tickets with binary activations "
            "(model.activation = 'sign') run as bits"
        )
    for name, layer in packed.items():
        model.set_submodule(name, _packed(layer))
    return model


def num_packed(model: nn.Module) -> int:
    """How many layers of a network run as bits; a linear one holds a convolution, which does."""
    return sum(isinstance(module, PackedConv2d) for module in model.modules())


@torch.no_grad()
def _reading_signs(model: nn.Module, images: Tensor) -> dict[str, GainLayer]:
    """The binary layers, by name, that have seen nothing but +1 and -1."""
    layers = {name: one for name, one in model.named_modules() if isinstance(one, GainLayer)}
    seen: dict[str, bool] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = seen.get(name, True) and bool((inputs[0].abs() == 1).all())

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    model(images)
    for hook in hooks:
        hook.remove()
    return {name: layer for name, layer in layers.items() if seen.get(name)}


def _can_pack(layer: GainLayer) -> bool:
    """Whether it is an ordinary convolution of one group, or a linear layer."""
    if nn.Linear in type(layer).__bases__:
        return True
    if not isinstance(layer, nn.Conv2d) or nn.Conv2d not in type(layer).__bases__:
        return False  # what is derived from a convolution may pad otherwise
    return (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def _packed(layer: GainLayer) -> nn.Module:
    """The layer as bits; its bias is zero."""
    if not isinstance(layer, nn.Conv2d):
        return PackedLinear(layer.binary, float(layer.gain))
    layer.bias = None
    return PackedConv2d.like(layer, layer.binary, float(layer.gain))
