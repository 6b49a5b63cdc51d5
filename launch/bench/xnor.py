"""`tombola bench xnor`: binary layers on packed words against float32 convolutions."""

import statistics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.bench.measure import interleaved, median_ratio, report
from pruning.xnor import PackedConv2d

_BATCH, _DENSITY, _GAIN, _ROUNDS = 16, 0.2, 0.05, 60
_LAYERS = {
    "CIFAR": ((64, 32), (128, 16), (256, 8), (512, 4)),
    "ImageNet": ((256, 14),),
}
"""channels and width of the image: stages of ResNet-18"""


class _Layer(NamedTuple):
    images: Tensor
    """[N, C, H, W] of -1 and +1"""
    binary: Tensor
    """[C, C, 3, 3] of -1, 0 and +1"""


def bench_xnor(*, as_json: bool) -> None:
    """Times `PackedConv2d` and `conv2d` on the same inputs in turn, and compares what they give.

    3 x 3 convolutions of ResNet-18 with a fifth of their weights, on the CPU. Packing the inputs
    is part of the packed layer's time, packing the weights is not. The packed layers use one core
    and `conv2d` as many as PyTorch has threads: `OMP_NUM_THREADS=1` compares core with core.
    """
    work = f"3 x 3 convolutions of ResNet-18, batch {_BATCH}, density {_DENSITY}, CPU"
    result: dict[str, Any] = {"work": f"{work}; above 1 is slower"}
    for images, shapes in _LAYERS.items():
        for channels, width in shapes:
            layer = _layer(channels, width)
            result[f"{images}, {channels} x {width} x {width}"] = _compare(layer)
    report(result, as_json=as_json)


def _layer(channels: int, width: int) -> _Layer:
    generator = torch.Generator().manual_seed(0)
    images, signs = (
        torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
        for shape in ((_BATCH, channels, width, width), (channels, channels, 3, 3))
    )
    return _Layer(images, signs * (torch.rand(signs.shape, generator=generator) < _DENSITY))


@torch.no_grad()
def _compare(layer: _Layer) -> dict[str, Any]:
    packed = PackedConv2d(layer.binary, _GAIN, padding=1)

    def in_float() -> Tensor:
        return F.conv2d(layer.images, layer.binary, padding=1).mul_(_GAIN)

    def in_bits() -> Tensor:
        y: Tensor = packed(layer.images)
        return y

    float_seconds, packed_seconds = interleaved(in_float, in_bits, rounds=_ROUNDS)
    return {
        "float32 seconds": statistics.median(float_seconds),
        "packed seconds": statistics.median(packed_seconds),
        "packed / float32": median_ratio(packed_seconds, float_seconds),
        "float32 bytes": layer.binary.nbytes,
        "packed bytes": packed.num_bytes,
        "equal results": torch.equal(in_float(), in_bits()),
    }
