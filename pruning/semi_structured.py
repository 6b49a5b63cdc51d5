"""2:4 layers as matrix products that NVIDIA's sparse tensor cores compute (Mishra et al. 2021,
2104.08378): of every four weights in a row along a layer's inputs two are stored, and their places.

A convolution is the product of its weight, `[out, kernel height * kernel width * in]`, and of what
its window sees at each place of the output: four inputs at one place of the kernel stay neighbours.
"""

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from pruning.masks import Masks
from pruning.n_of_m import Pattern

PATTERN = Pattern(2, 4)


def semi_structured(masks: Masks) -> list[str]:
    """The weights of which at most two of every four along the inputs are kept, in layer order."""
    return [
        name
        for name, mask in masks.items()
        if mask.dim() in (2, 4)
        and PATTERN.fits(tuple(mask.shape))
        and bool((_groups(mask).sum(1) <= PATTERN.n).all())
    ]


# What is stored --------------------------------------------------------------------------------


def compress(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The two kept weights of every four, and where among these they stand.

    `weight`: `[out, in]` or `[out, in, height, width]`, `mask`: bool of its shape, at most two of
    four. Values: `[out, in / 2]` or `[out, height, width, in / 2]`; places, uint8, two groups a
    byte, the first in its low half: the first place in the two low bits of that, the second, which
    is larger, above. Where fewer than two are kept a place that is pruned, with a zero, stands in.
    """
    groups, kept = _groups(weight * mask), _groups(mask)
    # The kept ones first, then the pruned ones, each in order: two are taken, and put in order.
    places = kept.logical_not().byte().argsort(dim=1, stable=True)[:, :2].sort(dim=1).values
    values = groups.gather(1, places).view(*_by_input(weight).shape[:-1], -1)
    nibbles = (places[:, 0] + 4 * places[:, 1]).byte()
    even = F.pad(nibbles, (0, len(nibbles) % 2)).view(-1, 2)
    return values, even[:, 0] + 16 * even[:, 1]


def decompress(values: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight of that shape, zeros where it is pruned: what `compress` was given, masked.

    Raises `ValueError` where values and places are not those of such a weight.
    """
    if len(shape) not in (2, 4) or not PATTERN.fits(shape):
        raise ValueError(f"a weight of shape {list(shape)} is not 2:4")
    num_groups = values.numel() // 2
    by_input = (shape[0], *shape[2:], shape[1] // 2)
    if tuple(values.shape) != by_input or places.dtype != torch.uint8:
        raise ValueError(f"values of shape {list(values.shape)}, not {list(by_input)}")
    if tuple(places.shape) != (-(-num_groups // 2),):
        raise ValueError(f"{places.numel()} bytes of places for {num_groups} groups")
    nibbles = torch.stack([places % 16, places // 16], dim=1).flatten()[:num_groups].long()
    pairs = torch.stack([nibbles % 4, nibbles // 4], dim=1)
    if not bool((pairs[:, 0] < pairs[:, 1]).all()):
        raise ValueError("places that are not in order")
    groups = values.new_zeros(num_groups, 4).scatter_(1, pairs, values.reshape(-1, 2))
    weight = groups.view(*by_input[:-1], shape[1])
    return weight.movedim(-1, 1).contiguous()


def _by_input(weight: Tensor) -> Tensor:
    """`[out, (height, width,) in]`."""
    return weight.movedim(1, -1)


def _groups(weight: Tensor) -> Tensor:
    """Every four in a row along the inputs: `[groups, 4]`."""
    return _by_input(weight).reshape(-1, PATTERN.m)


# What is computed ------------------------------------------------------------------------------


class ProductLinear(nn.Module):
    """A linear layer whose weight, a matrix, may be one of torch's semi-structured tensors."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = _matrix(layer.weight)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x: [..., inputs]` -> `[..., outputs]`."""
        return F.linear(x, self.weight, self.bias)


class ProductConv2d(nn.Module):
    """A convolution as one matrix product: `[N, in, H, W]` to `[N, out, H', W']`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight = _matrix(layer.weight)
        self.bias = layer.bias
        self.kernel, self.stride = layer.kernel_size, layer.stride
        assert not isinstance(layer.padding, str)
        self.padding, self.dilation = layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        """`x: [N, C, H, W]` -> `[N, outputs, H', W']`."""
        seen = self._seen(x)
        y = F.linear(seen.reshape(-1, self.weight.shape[1]), self.weight, self.bias)
        return y.view(*seen.shape[:3], -1).permute(0, 3, 1, 2)

    def _seen(self, x: Tensor) -> Tensor:
        """What the kernel sees: `[N, H', W', height, width, in]`, a view of the padded images."""
        height, width = self.padding
        x = F.pad(x, (width, width, height, height)).contiguous(memory_format=torch.channels_last)
        batch, channels, *size = x.shape
        out = [
            (side - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, dilation in zip(
                size, self.kernel, self.stride, self.dilation, strict=True
            )
        ]
        image, _, row, column = x.stride()
        strides = (row * self.stride[0], column * self.stride[1])
        steps = (row * self.dilation[0], column * self.dilation[1])
        shape = (batch, *out, *self.kernel, channels)
        return x.as_strided(shape, (image, *strides, *steps, x.stride(1)))


def _matrix(weight: Tensor) -> nn.Parameter:
    """`[out, everything else]`, neighbours along the inputs next to each other."""
    return nn.Parameter(_by_input(weight.detach()).reshape(len(weight), -1), requires_grad=False)


def as_products(model: nn.Module, names: Collection[str], *, kernels: bool = True) -> list[str]:
    """Has `model` compute these layers, by their weights, as matrix products; which they are.

    The matrices are torch's semi-structured tensors, for `model` on CUDA in fp16 or bf16; dense
    ones with `kernels = False`, anywhere. A layer stays as it is where the kernels do not take its
    shape (sides that are multiples of 32 and 64 fit all of them), and where it is more than a plain
    convolution or linear layer: in groups, padded with something else than zeros, a class of its
    own.
    """
    computed = []
    for name, layer in _plain_layers(model, names):
        product = ProductLinear(layer) if isinstance(layer, nn.Linear) else ProductConv2d(layer)
        if kernels and not _use_kernels(product):
            continue
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), child, product)
        computed.append(name)
    return computed


def _plain_layers(
    model: nn.Module, names: Collection[str]
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for name in names:
        layer = model.get_submodule(name.rpartition(".")[0])
        if type(layer) is nn.Linear or (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        ):
            yield name, layer


def _use_kernels(product: ProductLinear | ProductConv2d) -> bool:
    """Makes a layer's matrix semi-structured; `False` where the kernels do not take its shape."""
    try:
        sparse = to_sparse_semi_structured(product.weight.detach())
    except RuntimeError as error:
        if "shape" not in str(error):
            raise
        return False
    product.weight = nn.Parameter(sparse, requires_grad=False)
    return True
