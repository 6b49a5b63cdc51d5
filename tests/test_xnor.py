"""Packed layers against the float layers they take the place of: equal to the last bit."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pruning import xnor
from pruning.xnor import PackedConv2d, PackedLinear

GAIN = 0.0371
CHANNELS = st.sampled_from([1, 3, 63, 64, 65, 130])
DENSITIES = st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0])


def signs(*shape: int, seed: int = 0) -> Tensor:
    """Inputs of -1 and +1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0


def ternary(*shape: int, density: float, seed: int = 1) -> Tensor:
    """Weights of which about `density` are not 0; the second output has none."""
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < density
    kept[1:2] = False
    return signs(*shape, seed=seed) * kept


def float_conv(x: Tensor, binary: Tensor, **geometry: Any) -> Tensor:
    """What the float network computes."""
    return F.conv2d(x, binary, **geometry) * GAIN


@st.composite
def geometries(draw: st.DrawFn, kernel: tuple[int, int], image: tuple[int, int]) -> dict[str, Any]:
    """Strides, paddings and dilations, as numbers or pairs, whose kernel fits the image."""

    def number_or_pair(values: list[int]) -> st.SearchStrategy[int | tuple[int, int]]:
        one = st.sampled_from(values)
        return one | st.tuples(one, one)

    geometry = {
        "stride": draw(number_or_pair([1, 2, 3])),
        "padding": draw(number_or_pair([0, 1, 2])),
        "dilation": draw(number_or_pair([1, 2])),
    }
    for axis in (0, 1):
        padding, dilation = (
            value if isinstance(value, int) else value[axis]
            for value in (geometry["padding"], geometry["dilation"])
        )
        if image[axis] + 2 * padding <= dilation * (kernel[axis] - 1):
            geometry |= {"padding": 2, "dilation": 1}
    return geometry


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Images, weights and the geometry."""
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3), (5, 1)]))
    image = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    num_images, num_outputs = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 37]))
    channels, density, seed = draw(CHANNELS), draw(DENSITIES), draw(st.integers(0, 1000))
    x = signs(num_images, channels, *image, seed=seed)
    binary = ternary(num_outputs, channels, *kernel, density=density, seed=seed)
    return x, binary, draw(geometries(kernel, image))


@given(convolutions(), st.sampled_from([1, 50, 1 << 16]), st.sampled_from([1, 20, 1 << 11]))
@settings(max_examples=200)
def test_any_convolution_equals_the_float_one(
    case: tuple[Tensor, Tensor, dict[str, Any]], block_words: int, block_pixels: int
) -> None:
    """However the work is cut: shapes, geometries and densities, and outputs without weights."""
    x, binary, geometry = case
    with mock.patch.multiple(xnor, _BLOCK_WORDS=block_words, _BLOCK_PIXELS=block_pixels):
        y = PackedConv2d(binary, GAIN, **geometry)(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, float_conv(x, binary, **geometry))


def test_a_layer_of_several_blocks_equals_the_float_one() -> None:
    """Blocks of their real size: images of 56 x 56, and of 4 x 4 with many outputs."""
    for shape, outputs in (((3, 64, 56, 56), 70), ((20, 192, 4, 4), 500)):
        x, binary = signs(*shape), ternary(outputs, shape[1], 3, 3, density=0.2)
        y = PackedConv2d(binary, GAIN, padding=1)(x)
        assert torch.equal(y, float_conv(x, binary, padding=1))


@given(CHANNELS, DENSITIES, st.sampled_from([(), (1,), (5,), (2, 3), (0,)]), st.integers(1, 40))
def test_any_linear_layer_equals_the_float_one(
    channels: int, density: float, batch: tuple[int, ...], num_outputs: int
) -> None:
    """Any number of leading dimensions, none and an empty one included."""
    x, binary = signs(*batch, channels), ternary(num_outputs, channels, density=density)
    y = PackedLinear(binary, GAIN)(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x, binary) * GAIN)


@pytest.mark.parametrize("channels", [511 * 64, 512 * 64, 2000 * 64])
def test_counts_of_very_wide_layers_do_not_overflow(channels: int) -> None:
    """Every weight mismatches; from 32,768 inputs on 16 bits would not hold the count."""
    binary = torch.ones(2, channels)
    assert PackedLinear(binary, 1.0)(-binary[:1]).tolist() == [[-channels, -channels]]
    assert PackedLinear(binary, 1.0)(binary[:1]).tolist() == [[channels, channels]]


def test_the_masked_xnor_formula_gives_the_same_numbers() -> None:
    """One weight, one input and whether it is padding, as the formula has it."""
    for weight in (-1.0, 0.0, 1.0):
        for value in (-1.0, 1.0):
            m, w, x = weight != 0, weight > 0, value > 0
            layer = PackedConv2d(torch.full((1, 1, 1, 1), weight), 1.0, padding=1)
            y = layer(torch.full((1, 1, 1, 1), value))[0, 0]
            for row in range(3):
                for column in range(3):
                    v = row == column == 1
                    expected = 2 * (m and v and x == w) - (m and v)
                    assert y[row, column] == expected


def test_the_layout_of_the_inputs_makes_no_difference() -> None:
    """channels_last, strided, reversed in its axes, half precision, and with a gradient."""
    binary = ternary(7, 65, 3, 3, density=0.2)
    layer = PackedConv2d(binary, GAIN, padding=1)
    x = signs(2, 65, 6, 8)
    strided = torch.zeros(4, 130, 12, 16)[::2, ::2, ::2, ::2].copy_(x)
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    others = [x.to(memory_format=torch.channels_last), strided, turned, x.bfloat16(), x.double()]
    for other in [*others, x.clone().requires_grad_()]:
        y = layer(other)
        assert torch.equal(y, float_conv(x, binary, padding=1))
        assert y.is_contiguous()
        assert not y.requires_grad


def test_no_images_give_no_outputs() -> None:
    """An empty batch."""
    layer = PackedConv2d(ternary(7, 65, 3, 3, density=0.2), GAIN)
    assert layer(torch.empty(0, 65, 6, 8)).shape == (0, 7, 4, 6)


def test_a_packed_layer_takes_the_place_of_another() -> None:
    """With its geometry, as `nn.Conv2d` holds it."""
    conv = nn.Conv2d(65, 7, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False)
    binary, x = ternary(*conv.weight.shape, density=0.2), signs(2, 65, 7, 9)
    with torch.no_grad():
        conv.weight.copy_(binary)
        assert torch.equal(PackedConv2d.like(conv, binary, GAIN)(x), conv(x) * GAIN)


def test_weights_take_two_bits_each_in_whole_words() -> None:
    """And are not in the state_dict, which the layer that it replaces has."""
    layer = PackedConv2d(ternary(10, 128, 3, 3, density=0.2), GAIN)
    assert layer.num_bytes == 10 * 128 * 3 * 3 * 2 // 8
    assert PackedConv2d(ternary(10, 65, 3, 3, density=0.2), GAIN).num_bytes == layer.num_bytes
    assert PackedLinear(ternary(10, 3, density=0.2), GAIN).num_bytes == 10 * 2 * 8
    assert not layer.state_dict()


@pytest.mark.parametrize("value", [0.0, 0.5, -2.0, 1.0000001, float("nan"), float("inf")])
def test_inputs_other_than_signs_are_refused(value: float) -> None:
    """A single one is found, wherever it is."""
    layer = PackedConv2d(ternary(2, 65, 1, 1, density=0.5), GAIN)
    x = signs(3, 65, 40, 40)
    x[2, 64, 39, 39] = value
    with pytest.raises(ValueError, match=r"^inputs hold other values than -1 and \+1$"):
        layer(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(1, 4, 5, 5), r"shape \[1, 4, 5, 5\]: expected \[N, 3, H, W\]"),
        (torch.ones(3, 5, 5), r"shape \[3, 5, 5\]: expected \[N, 3, H, W\]"),
        (torch.ones(1, 3, 5, 2), "images of 5 x 2 are smaller than the kernel"),
        (torch.ones(1, 3, 0, 5), "images of 0 x 5 are smaller than the kernel"),
        (torch.ones(1, 3, 5, 5, dtype=torch.int64), "torch.int64: expected floats"),
        (torch.ones(1, 3, 5, 5, device="meta"), "inputs on meta: packed layers run on the CPU"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Tensor, message: str) -> None:
    """In one line that says what was expected."""
    layer = PackedConv2d(ternary(2, 3, 3, 3, density=0.5), GAIN)
    with pytest.raises(ValueError, match=message):
        layer(x)
    with pytest.raises(ValueError, match=r"shape \[2, 4\]: expected \[..., 3\]"):
        PackedLinear(ternary(2, 3, density=0.5), GAIN)(torch.ones(2, 4))


@pytest.mark.parametrize("value", [0.5, 2.0, float("nan")])
def test_weights_that_are_not_ternary_are_refused(value: float) -> None:
    """Of convolutions and of linear layers."""
    with pytest.raises(ValueError, match="other values than -1, 0 and"):
        PackedConv2d(torch.full((1, 1, 1, 1), value), GAIN)
    with pytest.raises(ValueError, match="other values than -1, 0 and"):
        PackedLinear(torch.full((1, 1), value), GAIN)


def test_weights_of_another_rank_are_refused() -> None:
    """A convolution has four dimensions, a linear layer two."""
    with pytest.raises(ValueError, match=r"expected \[O, C, kh, kw\]"):
        PackedConv2d(torch.ones(2, 3), GAIN)
    with pytest.raises(ValueError, match=r"expected \[O, C\]"):
        PackedLinear(torch.ones(2, 3, 1, 1), GAIN)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_a_geometry_that_makes_no_sense_is_refused(name: str) -> None:
    """Numbers that are too small, and padding by name."""
    for value in (-1, (1, -1), (1, 1, 1), "same"):
        geometry: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"{name} = .*: expected one or two whole numbers"):
            PackedConv2d(torch.ones(1, 1, 1, 1), GAIN, **geometry)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "groups = 2"),
        ({"padding": "same"}, "padding = 'same'"),
        ({"padding_mode": "circular"}, "padding_mode = 'circular'"),
        ({"bias": True}, "a bias"),
        ({"kernel_size": 5}, r"shape \[6, 4, 3, 3\], the layer's \[6, 4, 5, 5\]"),
    ],
)
def test_layers_that_cannot_be_packed_are_refused(options: dict[str, Any], message: str) -> None:
    """Each by what stands in the way."""
    conv = nn.Conv2d(4, 6, **({"kernel_size": 3, "bias": False} | options))
    with pytest.raises(ValueError, match=message):
        PackedConv2d.like(conv, torch.ones(6, 4, 3, 3), GAIN)
