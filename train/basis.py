"""Weights in another basis: layers that train coefficients, and compute with what they stand for.

Alabdulmohsin et al. 2021 (A Generalized Lottery Ticket Hypothesis, 2107.06825): theta = B alpha
with an orthonormal B for each layer; what is trained, ranked, pruned and rewound is alpha. How B
acts on a layer is our choice: its weight is read as a matrix, a row for each output and a column
for each input and place of the kernel, and

    theta = L alpha R^T          B = L kron R, orthonormal as L and R are

`dct`: L and R are inverse DCTs, so that alpha is the orthonormal two-dimensional DCT-II of theta.
`random`: L and R are orthogonal matrices from the Haar measure, the same for a side of one size in
every network, so that a ticket's basis follows from its model alone. alpha begins as B^T theta: the
network computes the same as without a basis.

A layer's parameter keeps its name and shape, `weight`, and holds alpha: masks, optimizers and
checkpoints see coefficients. To whoever computes with the layer, `layer.weight` is theta.
"""

import contextlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data.order import random_bits, stream_seed

Basis = Literal["identity", "dct", "random"]
Side = Literal["outputs", "inputs"]
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""whose weights are in a basis, and which masks are of"""
_LARGEST = 1 << 14
"""of a side: 1 GiB in float32"""


def check_basis(name: object) -> None:
    """Raises `ValueError` unless there is such a basis, whoever wrote the name."""
    known = ("identity", *_MATRICES)
    if name not in known:
        raise ValueError(f"basis = {name!r:.40}: must be one of {', '.join(known)}")


# Matrices --------------------------------------------------------------------------------


def orthonormal(basis: str, side: Side, size: int) -> Tensor:
    """L (`outputs`) or R (`inputs`) of a basis: `[size, size] float64`, its columns orthonormal."""
    return _MATRICES[basis](side, size)


def _inverse_dct(side: Side, size: int) -> Tensor:
    """Column k is the k-th cosine of the DCT-II: `sqrt(2 / n) cos(pi (2 i + 1) k / 2 n)`."""
    places = torch.arange(size)
    turns = torch.outer(2 * places + 1, places) % (4 * size)  # exact, where cosines of n pi are not
    matrix = torch.cos(turns.double() * (math.pi / (2 * size))) * math.sqrt(2 / size)
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix


def _random_orthogonal(side: Side, size: int) -> Tensor:
    """Q of a Gaussian matrix Q U, where the diagonal of U is positive, which makes it Haar's.

    Mezzadri 2007 (math-ph/0609050, section 5). Exact but for rounding in float64.
    """
    bits = random_bits(stream_seed(0, "basis", side, size), np.arange(size * size))
    uniform = torch.from_numpy(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    q, u = torch.linalg.qr(torch.special.ndtri(uniform).view(size, size))
    orthogonal: Tensor = q * torch.sign(u.diagonal())
    return orthogonal


_MATRICES: dict[str, Callable[[Side, int], Tensor]] = {
    "dct": _inverse_dct,
    "random": _random_orthogonal,
}


@cache
def _shared(basis: str, side: Side, size: int) -> Tensor:
    """The matrix in float32, computed once, for all layers with such a side."""
    return orthonormal(basis, side, size).float()


# Layers ----------------------------------------------------------------------------------


class BasisLayer(nn.Module):
    """A convolution or linear layer whose parameter `weight` holds coefficients.

    Mixed into the class of a layer by `take_basis`.
    """

    left: Tensor
    """L, in no state dict"""
    right: Tensor
    """R"""

    @property
    def weight(self) -> Tensor:
        """theta, of the shape of the coefficients, in their own precision under autocast too."""
        coefficients = self._parameters["weight"]
        assert coefficients is not None
        with _exactly(coefficients.device):
            return (self.left @ coefficients.flatten(1) @ self.right.T).view(coefficients.shape)


def _exactly(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Without autocast, which `meta` does not know: theta is rounded once, where it is used."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@cache
def _mixed(layer: type[Any]) -> type[nn.Module]:
    return type(f"Basis{layer.__name__}", (BasisLayer, layer), {})


def take_basis(model: nn.Module, basis: str) -> None:
    """Makes the convolutions and linear layers of `model` a `BasisLayer` each, in place.

    The network computes the same; a weight that layers share stays one parameter. On `meta` the
    matrices have no memory either. Raises `ValueError` for a layer with too large a side.
    """
    changed: set[nn.Parameter] = set()
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight") if isinstance(layer, LAYERS) else None
        if weight is None:
            continue
        sides: dict[Side, int] = {"outputs": len(weight), "inputs": weight[0].numel()}
        for side, size in sides.items():
            if size > _LARGEST:
                raise ValueError(
                    f"basis = {basis!r}: layer {name} has {size:,} {side}, of which at most "
                    f"{_LARGEST:,} are mixed; choose another model"
                )
        left, right = (_matrix(basis, side, size, weight) for side, size in sides.items())
        if weight not in changed and not weight.is_meta:
            theta = weight.detach()
            alpha = left.double().T @ theta.double().flatten(1) @ right.double()
            theta.copy_(alpha.view_as(theta))
        changed.add(weight)
        layer.__class__ = _mixed(type(layer))  # type: ignore[arg-type]
        layer.register_buffer("left", left, persistent=False)
        layer.register_buffer("right", right, persistent=False)


def _matrix(basis: str, side: Side, size: int, weight: Tensor) -> Tensor:
    if weight.is_meta:
        return torch.empty(size, size, device="meta")
    return _shared(basis, side, size)


@torch.no_grad()
def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the same network without a basis: theta where this one has alpha."""
    layers = model.named_modules(remove_duplicate=False)
    weights = {f"{name}.weight": one.weight for name, one in layers if isinstance(one, BasisLayer)}
    return model.state_dict() | weights
