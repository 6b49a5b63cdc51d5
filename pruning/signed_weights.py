"""The weights of a multi-prize ticket as they are stored: a seed, one gain a layer, and the rest.

Of a layer whose weights were never trained nothing is kept but its gain: its signs are drawn again
from the seed (`pruning.random_weights`), or stored as bits where they came from elsewhere. All
other tensors of the state dict, normalisations and their statistics among them, are stored whole.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pruning import document
from pruning.mask_store import StoredMasks, read_masks
from pruning.objects import Objects, require_memory
from pruning.packing import Shape, canonical
from pruning.random_weights import random_signs
from pruning.weight_store import StoredWeights, read_weights

GENERATOR = "philox4x32-10"
_LARGEST_SEED = (1 << 32) - 1
_LARGEST_GAIN = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class SignedLayer:
    """A weight that is a gain times signs."""

    shape: Shape
    index: int
    """of the layer in its network: it chooses the stream of signs"""
    gain: float
    """exactly a float32, above 0"""

    @classmethod
    def from_json(cls, value: Any, name: str) -> "SignedLayer":
        """Raises `ValueError` or `KeyError`."""
        row = document.mapping(value, name)
        gain = float(document.number(row["gain"], f"the gain of {name}"))
        if not 0 < gain <= _LARGEST_GAIN or torch.tensor(gain).item() != gain:
            raise ValueError(f"the gain of {name} is {gain}, not a float32 above 0")
        index = document.count(row["index"], f"the index of {name}", _LARGEST_SEED)
        return cls(document.shape(row["shape"], name), index, gain)


@dataclass(frozen=True)
class SignedWeights:
    """Where such a state dict is, and what it must be: its part of a ticket's index."""

    layers: dict[str, SignedLayer]
    """by the names of their weights"""
    rest: StoredWeights
    seed: int | None
    """of the generator of signs"""
    signs: StoredMasks | None = None
    """instead of a seed: the signs themselves, `True` for +1"""

    @cached_property
    def digest(self) -> str:
        """The SHA-256 that names the state."""
        return hashlib.sha256(canonical(self._identity())).hexdigest()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every tensor of the state dict."""
        return self.rest.shapes | {name: layer.shape for name, layer in self.layers.items()}

    @property
    def objects(self) -> dict[str, int]:
        """The digests of the objects that hold it, with their bytes."""
        return self.rest.objects | (self.signs.objects if self.signs is not None else {})

    def read(self, objects: Objects) -> dict[str, Tensor]:
        """The state dict on the CPU, each weight its gain times its sign. Raises `RunError`."""
        signs = self.read_signs(objects)
        signed = {name: signs[name] * layer.gain for name, layer in self.layers.items()}
        return {**read_weights(objects, self.rest), **signed}

    def read_signs(self, objects: Objects) -> dict[str, Tensor]:
        """+1 or -1 for each weight of the layers, as float32. Raises `RunError`."""
        size = sum(math.prod(layer.shape) for layer in self.layers.values())
        require_memory(4 * size, f"{size:,} weights take four bytes each")
        if self.signs is not None:
            stored = read_masks(objects, self.signs)
            return {name: 2 * stored[name].float() - 1 for name in self.layers}
        assert self.seed is not None, "signs are stored or have a seed"
        return {
            name: random_signs(layer.shape, seed=self.seed, layer=layer.index)
            for name, layer in self.layers.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Their part of a ticket's index."""
        signs = None if self.signs is None else self.signs.to_json()
        rest = self.rest.to_json()
        return {"generator": GENERATOR, "seed": self.seed, **self._rows(), "signs": signs, **rest}

    def _rows(self) -> dict[str, Any]:
        rows = {name: asdict(one) | {"shape": list(one.shape)} for name, one in self.layers.items()}
        return {"layers": rows}

    def _identity(self) -> dict[str, Any]:
        signs = None if self.signs is None else self.signs.digest
        return {"seed": self.seed, **self._rows(), "signs": signs, "rest": self.rest.digest}

    @classmethod
    def from_json(cls, value: Any) -> "SignedWeights":
        """Raises `ValueError` or `KeyError` where it is not what `to_json` gives."""
        fields = document.mapping(value, "weights")
        if fields["generator"] != GENERATOR:
            raise ValueError(f"its signs are of an unknown generator: {fields['generator']!r:.40}")
        seed, signs = fields["seed"], fields["signs"]
        found = cls(
            document.table(SignedLayer.from_json, fields["layers"], "weights.layers"),
            StoredWeights.from_json(fields),
            seed_from_json(seed),
            None if signs is None else StoredMasks.from_json(signs),
        )
        if (seed is None) == (signs is None):
            raise ValueError("its signs must have a seed or be stored, one of both")
        if found.signs is not None and found.signs.shapes != {
            name: layer.shape for name, layer in found.layers.items()
        }:
            raise ValueError("its stored signs are not those of its layers")
        if found.layers.keys() & found.rest.tensors.keys():
            raise ValueError("a weight is there twice")
        return found


def seed_from_json(value: Any) -> int | None:
    """The seed of signs, or `None`. Raises `ValueError`."""
    return None if value is None else document.count(value, "the seed of its signs", _LARGEST_SEED)


def stored_state(value: Any) -> StoredWeights | SignedWeights:
    """The weights' part of a ticket's index, of either form. Raises `ValueError` or `KeyError`."""
    signed = "generator" in document.mapping(value, "weights")
    return SignedWeights.from_json(value) if signed else StoredWeights.from_json(value)
