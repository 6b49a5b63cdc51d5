"""Which weights are kept: `Masks` and its algebra."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.errors import UserError, did_you_mean
from pruning.packing import Packing, Shape
from train.basis import LAYERS


@dataclass(frozen=True)
class LayerDensity:
    """A row of the per-layer table."""

    name: str
    shape: tuple[int, ...]
    kept: int
    size: int

    @property
    def density(self) -> float:
        """The fraction kept."""
        return self.kept / self.size


class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool tensor of its shape, `True` where the weight is kept; in layer order.

    Immutable: every operation gives new masks.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"mask of {name} is {mask.dtype}, not bool")
        self._masks = dict(masks)

    @classmethod
    def ones(cls, model: nn.Module, exclude: Iterable[str] = ()) -> "Masks":
        """Everything prunable is kept."""
        weights = prunable(model, exclude)
        return cls({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __and__(self, other: "Masks") -> "Masks":
        """What both keep. Raises `ValueError` unless both are masks of the same weights."""
        self._require_same_weights(other)
        return Masks({name: mask & other[name].to(mask.device) for name, mask in self.items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Masks) and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return sum(map(count_kept, self.values()))

    @property
    def size(self) -> int:
        """How many weights could be pruned."""
        return sum(mask.numel() for mask in self.values())

    @property
    def density(self) -> float:
        """The fraction kept."""
        return self.kept / self.size

    def table(self) -> list[LayerDensity]:
        """What is kept per layer, in layer order."""
        return [
            LayerDensity(name, tuple(mask.shape), count_kept(mask), mask.numel())
            for name, mask in self.items()
        ]

    def digest(self) -> str:
        """SHA-256 over names, shapes and bits, the same for any order of layers and any device."""
        packing = Packing.of(self)
        return packing.digest(packing.digests(self))

    @torch.no_grad()
    def project_(self, model: nn.Module) -> None:
        """Sets the pruned weights of `model` to zero, in place.

        Raises `ValueError` where a weight is missing or of another shape.
        """
        weights = dict(model.named_parameters())
        for name, mask in self.items():
            if name not in weights or weights[name].shape != mask.shape:
                found = tuple(weights[name].shape) if name in weights else "no such weight"
                raise ValueError(f"mask of {name}: {tuple(mask.shape)}, model: {found}")
            weights[name].masked_fill_(~mask.to(weights[name].device), 0)

    def to(self, device: torch.device | str) -> "Masks":
        """The same masks on another device."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    def _require_same_weights(self, other: "Masks") -> None:
        mine = {name: tuple(mask.shape) for name, mask in self.items()}
        theirs = {name: tuple(mask.shape) for name, mask in other.items()}
        if mine != theirs:
            names = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
            raise ValueError(f"masks of different weights: {', '.join(names[:3])}")


def count_kept(mask: Tensor) -> int:
    """How many are `True`; on the CPU by NumPy, which is an order of magnitude faster."""
    return int(np.count_nonzero(mask.numpy()) if mask.is_cpu else mask.sum())


def prunable(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """The weights of all convolutions and linear layers by name, in layer order.

    `exclude` holds patterns of module names (`fc`, `stages.*.shortcut*`). Raises `UserError` for a
    pattern that matches no such layer, or if nothing is left.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    # What a layer trains: its `weight` may be computed from that (`train.basis`).
    own = {name: layer._parameters.get("weight") for name, layer in layers.items()}
    excluded: set[Tensor | None] = set()  # a weight that two layers share is excluded with either
    for pattern in exclude:
        matched = fnmatch.filter(layers, pattern)
        if not matched:
            near = did_you_mean(pattern, layers)
            raise UserError(f"exclude = {pattern!r} matches no convolution or linear layer{near}")
        excluded.update(own[name] for name in matched)
    names = {weight: name for name, weight in model.named_parameters()}
    found = [weight for weight in own.values() if weight is not None and weight not in excluded]
    weights = {names[weight]: weight for weight in found}
    if not weights:
        raise UserError("exclude leaves no layer to prune")
    return weights


def maskable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a ticket's masks may be of: what is prunable, and the scales and shifts of batch
    normalisations, which go with a channel; in layer order."""
    weights = set(prunable(model).values())
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            weights.update(module.parameters())
    return {name: weight for name, weight in model.named_parameters() if weight in weights}


def prunable_shapes(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, Shape]:
    """The shapes of what `prunable` gives. Raises as it does."""
    return {name: tuple(weight.shape) for name, weight in prunable(model, exclude).items()}
