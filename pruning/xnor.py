"""Binary layers on packed words: masked XNOR and popcount instead of multiplications.

A weight is -1, 0 or +1, an input -1 or +1. Sixty-four channels are one word; a weight has a bit of
the mask `m` (it is not 0) and of the sign `w` (it is +1), an input the bit `x` (it is +1). With `v`
set inside the image and not in its padding, the convolution is

    y = 2 * popcount(m & v & ~(x ^ w)) - popcount(m & v)

These are integers, and so equal to the float convolution of the same numbers to the last bit; the
layer's gain is applied to them in float32, as the float network does.

What runs is the same with fewer passes. `w` is 0 where `m` is, so that `(x & m) ^ w` marks the
mismatches; padding is taken for inputs of -1, and what that adds, which depends on nothing but the
place in the image, is taken off at the end. NumPy does this, on one core whatever the threads of
PyTorch: a pass over a block takes microseconds, less than it may take to wake a second thread.
"""

import math
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn

Pair = tuple[int, int]
Words = NDArray[np.uint64]
_WORD = 64
# Measured: in blocks of half a MiB a pass takes much longer than the call, and what the next pass
# reads is still in a second-level cache.
_BLOCK_WORDS = 65536
_BLOCK_PIXELS = 2048
_WORDS_PER_BYTE = 3
"""how many words' counts a byte can sum: 3 * 64 < 256 <= 4 * 64"""
# NumPy copies a broadcast operand through its buffer where rows are shorter than that, which makes
# a pass three times as long. Affects nothing but the time.
_UFUNC_BUFFER = 256


class PackedConv2d(nn.Module):
    """A convolution of +-1 inputs with ternary weights times one gain, on the CPU, forward only.

    What it holds are the weights' bits, made anew from a ticket: it has no entry in a state_dict.
    """

    def __init__(
        self,
        binary: Tensor,
        gain: float,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
    ) -> None:
        """`binary`: [O, C, kh, kw] of -1, 0 and +1. Raises `ValueError` for anything else."""
        super().__init__()
        if binary.dim() != 4 or binary.numel() == 0:
            raise ValueError(f"weights of shape {list(binary.shape)}: expected [O, C, kh, kw]")
        self.stride = _pair("stride", stride, least=1)
        self.padding = _pair("padding", padding, least=0)
        self.dilation = _pair("dilation", dilation, least=1)
        self.out_channels, self.in_channels = binary.shape[:2]
        self.kernel_size: Pair = (binary.shape[2], binary.shape[3])
        self.gain = float(np.float32(gain))
        self.planes = _pack_weights(binary)
        """[2, kh * kw * words, O]: the mask and, of what it keeps, the signs"""

    @classmethod
    def like(cls, conv: nn.Conv2d, binary: Tensor, gain: float) -> Self:
        """One that takes the place of `conv`. Raises `ValueError` where it could not.

        It has no groups, and no padding but zeros of a given width.
        """
        if conv.groups != 1:
            raise ValueError(f"groups = {conv.groups}: packed convolutions have one group")
        if isinstance(conv.padding, str):
            raise ValueError(f"padding = {conv.padding!r}: give the width as numbers")
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode = {conv.padding_mode!r}: only 'zeros' can be packed")
        if conv.bias is not None:
            raise ValueError("a bias: packed convolutions have none")
        if binary.shape != conv.weight.shape:
            shapes = f"{list(binary.shape)}, the layer's {list(conv.weight.shape)}"
            raise ValueError(f"binary weights of shape {shapes}")
        geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        return cls(binary, gain, **{name: (pair[0], pair[1]) for name, pair in geometry.items()})

    @property
    def num_bytes(self) -> int:
        """What the packed weights take: two bits for each, channels filled up to whole words."""
        return self.planes.nbytes

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`x`: [N, C, H, W] of -1 and +1; gives [N, O, H', W'] float32, without a gradient.

        Raises `ValueError` for another number of channels, for other values, for images smaller
        than the kernel and for tensors that are not on the CPU.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"inputs of shape {list(x.shape)}: expected [N, {self.in_channels}, H, W]"
            )
        height, width = (self._num_places(axis, x.shape[2 + axis]) for axis in (0, 1))
        if min(height, width, *x.shape[2:]) < 1:
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} are smaller than the kernel")
        return self._convolve(_pack_inputs(x, self.padding), self._start(x), (height, width))

    def _num_places(self, axis: int, size: int) -> int:
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    def _convolve(self, words: Words, start: NDArray[np.float32], size: Pair) -> Tensor:
        """`words`: [words, N, H, W], padded; `start`: [O, 1, H' * W']."""
        mask, sign = self.planes
        num_images = words.shape[1]
        y = np.empty((num_images, self.out_channels, size[0] * size[1]), np.float32)
        for images in _blocks(num_images, _BLOCK_PIXELS // y.shape[2]):
            columns = self._columns(words[:, images])
            for outputs in _blocks(self.out_channels, _BLOCK_WORDS // columns.shape[1]):
                into = y[images, outputs].swapaxes(0, 1)
                wrong = _mismatches(columns, mask[:, outputs], sign[:, outputs])
                np.multiply(wrong.reshape(into.shape), np.float32(-2), out=into)
                into += start[outputs]
                into *= self.gain
        return torch.from_numpy(y).view(*y.shape[:2], *size)

    def _columns(self, words: Words) -> Words:
        """The words under each weight: [kh * kw * words, N * H' * W'] of [words, N, H, W]."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        windows = sliding_window_view(words, reach, axis=(2, 3))
        (down, right), (rows, columns) = self.stride, self.dilation
        windows = windows[:, :, ::down, ::right, ::rows, ::columns]
        windows = windows.transpose(4, 5, 0, 1, 2, 3)
        return windows.reshape(math.prod(windows.shape[:3]), -1)

    def _start(self, x: Tensor) -> NDArray[np.float32]:
        """The sum where nothing mismatches, less what padding adds if it is taken for -1.

        [O, 1, H' * W']: whole numbers, which float32 holds up to 2^24.
        """
        taps = self.kernel_size[0] * self.kernel_size[1]
        counts = np.bitwise_count(self.planes).reshape(2, taps, -1, self.out_channels)
        kept, positive = counts.sum(2, dtype=np.float64).swapaxes(1, 2)  # [O, kh * kw]
        inside = F.unfold(
            torch.ones(1, 1, *x.shape[2:], dtype=torch.float64),
            self.kernel_size,
            dilation=self.dilation,
            padding=self.padding,
            stride=self.stride,
        )
        padded = (2 * positive - kept) @ (1 - inside[0].numpy())
        start: NDArray[np.float64] = kept.sum(1, keepdims=True) + padded
        return start[:, None].astype(np.float32)


class PackedLinear(nn.Module):
    """A product of +-1 inputs with ternary weights times one gain, as `PackedConv2d` has it."""

    def __init__(self, binary: Tensor, gain: float) -> None:
        """`binary`: [O, C] of -1, 0 and +1. Raises `ValueError` for anything else."""
        super().__init__()
        if binary.dim() != 2 or binary.numel() == 0:
            raise ValueError(f"weights of shape {list(binary.shape)}: expected [O, C]")
        self.pointwise = PackedConv2d(binary[:, :, None, None], gain)
        self.out_features, self.in_features = binary.shape

    @property
    def num_bytes(self) -> int:
        """What the packed weights take: two bits for each, channels filled up to whole words."""
        return self.pointwise.num_bytes

    def forward(self, x: Tensor) -> Tensor:
        """`x`: [..., C] of -1 and +1; gives [..., O] float32. Errors as of `PackedConv2d`."""
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"inputs of shape {list(x.shape)}: expected [..., {self.in_features}]")
        y: Tensor = self.pointwise(x.reshape(-1, self.in_features, 1, 1))
        return y.view(*x.shape[:-1], self.out_features)


def _pair(name: str, value: int | Pair, *, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else value
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"{name} = {value!r}: expected one or two whole numbers from {least}")
    return pair


def _blocks(total: int, length: int) -> Iterator[slice]:
    length = max(1, length)
    return (slice(i, min(i + length, total)) for i in range(0, total, length))


def _pack_weights(binary: Tensor) -> Words:
    """[2, kh * kw * words, O] of [O, C, kh, kw]."""
    if not bool(((binary == 0) | (binary.abs() == 1)).all()):
        raise ValueError("binary weights hold other values than -1, 0 and +1")
    weights = binary.detach().float().cpu().flatten(2).permute(2, 0, 1).numpy()  # [taps, O, C]
    planes = np.stack([_pack_channels(np.abs(weights)), _pack_channels(weights)])
    return np.ascontiguousarray(planes.swapaxes(2, 3)).reshape(2, -1, len(binary))


def _pack_inputs(x: Tensor, padding: Pair) -> Words:
    """[words, N, H + 2 * padding, W + 2 * padding] of [N, C, H, W]."""
    if x.device.type != "cpu":
        raise ValueError(f"inputs on {x.device}: packed layers run on the CPU")
    if not x.is_floating_point():
        raise ValueError(f"inputs of {x.dtype}: expected floats, -1.0 and +1.0")
    num_words = -(-x.shape[1] // _WORD)
    down, right = padding
    shape = (num_words, len(x), x.shape[2] + 2 * down, x.shape[3] + 2 * right)
    words = np.zeros(shape, np.uint64)
    inside = words[:, :, down : shape[2] - down, right : shape[3] - right].transpose(1, 2, 3, 0)
    values = (x.float() if x.dtype == torch.bfloat16 else x.detach()).numpy()
    for images in _blocks(len(x), _BLOCK_WORDS // math.prod(x.shape[1:])):
        sizes = np.abs(values[images])
        if not sizes.min() == sizes.max() == 1:  # both are nan if any is
            raise ValueError("inputs hold other values than -1 and +1")
        inside[images] = _pack_channels(values[images].transpose(0, 2, 3, 1))
    return words


def _pack_channels(values: NDArray[Any]) -> Words:
    """A bit for each that is above 0: [..., words] of [..., C].

    The last word's missing channels are 0.
    """
    packed = np.packbits(np.ascontiguousarray(values > 0), axis=-1)
    num_bytes = -(-values.shape[-1] // _WORD) * _WORD // 8
    if packed.shape[-1] < num_bytes:
        words = np.zeros((*packed.shape[:-1], num_bytes), np.uint8)
        words[..., : packed.shape[-1]] = packed
        packed = words
    return packed.view(np.uint64)


def _mismatches(columns: Words, mask: Words, sign: Words) -> NDArray[np.signedinteger[Any]]:
    """How many kept weights have another sign than their inputs.

    `columns`: [K, P] words of inputs; `mask`, `sign`: [K, O] words of weights. Gives [O, P].
    """
    turned = columns.shape[1] < mask.shape[1]  # the longer axis is the inner one
    if turned:
        x, m, w = columns[:, :, None], mask[:, None], sign[:, None]
    else:
        x, m, w = columns[:, None], mask[:, :, None], sign[:, :, None]
    shape = np.broadcast_shapes(x.shape[1:], m.shape[1:])
    marked, count, few = (
        np.empty(shape, np.uint64),
        np.empty(shape, np.uint8),
        np.zeros(shape, np.uint8),
    )
    total = np.zeros(shape, np.int16 if len(x) * _WORD < 1 << 15 else np.int32)
    for index, (inputs, kept, positive) in enumerate(zip(x, m, w, strict=True), 1):
        _mark(inputs, kept, positive, out=marked)
        np.bitwise_count(marked, out=count)
        few += count
        if index % _WORDS_PER_BYTE == 0 or index == len(x):
            total += few
            few.fill(0)
    return total.T if turned else total


def _mark(x: Words, m: Words, w: Words, *, out: Words) -> None:
    with np.errstate():  # what ends the change of the size, too
        np.setbufsize(_UFUNC_BUFFER)
        np.bitwise_and(x, m, out=out)
        np.bitwise_xor(out, w, out=out)
