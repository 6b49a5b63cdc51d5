"""Scores read as keys: integers in the scores' order, chunk by chunk.

A float's bits, read as an integer, are ordered as the floats are, once negative ones are turned
round.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 17  # half a MiB of keys: fits a core's cache
_GPU_CHUNK = 1 << 24
_INFINITY = 0x7F800000
LOWEST, HIGHEST = -(1 << 31), (1 << 31) - 1

# A NumPy array on the CPU, where NumPy compares and extracts several times faster than torch; a
# tensor elsewhere. Only what both understand alike is asked of it.
Array = Any


class Chunk(NamedTuple):
    """A part of a layer: its keys, which of them are candidates (`None`: all), its marks."""

    name: str
    keys: Array
    candidate: Array | None
    marks: Array

    def which(self, found: Array) -> Array:
        """`found`, a bool array over the chunk, less what is no candidate."""
        return found if self.candidate is None else found & self.candidate

    def candidates(self) -> Array:
        """The keys of the candidates."""
        return self.keys if self.candidate is None else self.keys[self.candidate]


@dataclass(frozen=True)
class Layers:
    """The scores that this rank holds, read as keys, in chunks of each layer's flat order."""

    scores: Mapping[str, Tensor]
    within: Mapping[str, Tensor] | None

    @property
    def size(self) -> int:
        """Scores of all layers together."""
        return sum(score.numel() for score in self.scores.values())

    def num_candidates(self) -> int:
        """Raises `ValueError` where `within` has other shapes than the scores."""
        if self.within is None:
            return self.size
        for name, score in self.scores.items():
            if name not in self.within:
                raise ValueError(f"no candidates are given for {name}")
            if self.within[name].shape != score.shape:
                shapes = f"{tuple(self.within[name].shape)}, not {tuple(score.shape)}"
                raise ValueError(f"the candidates of {name} have the shape {shapes}")
        return sum(count_true(_array(self.within[name])) for name in self.scores)

    def chunks(
        self,
        names: Iterable[str] | None = None,
        stride: int = 1,
        marks: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Chunk]:
        """Every `stride`-th score of the layers (default: all). Raises `ValueError` for a NaN.

        `marks`: masks to be written, of which each chunk gets its part.
        """
        for name in self.scores if names is None else names:
            parts = _split(self.scores[name], stride)
            nothing = [None] * len(parts)
            candidates = nothing if self.within is None else _split(self.within[name], stride)
            marked = nothing if marks is None else _split(marks[name], stride)
            for score, candidate, mark in zip(parts, candidates, marked, strict=True):
                yield Chunk(name, _keys(score, name), _array(candidate), _array(mark))


def _split(tensor: Tensor, stride: int) -> tuple[Tensor, ...]:
    chunk = _CHUNK if tensor.device.type == "cpu" else _GPU_CHUNK
    parts: tuple[Tensor, ...] = tensor.detach().contiguous().flatten()[::stride].split(chunk)
    return parts


def _array(tensor: Tensor | None) -> Array:
    return tensor.numpy() if tensor is not None and tensor.device.type == "cpu" else tensor


def _keys(scores: Tensor, name: str) -> Array:
    """`int32`, ordered as the scores are; both zeros are 0. Raises `ValueError` for a NaN.

    May be the scores' own memory.
    """
    keys = _array(scores.float().contiguous().view(torch.int32))
    if not len(keys):
        return keys
    if isinstance(keys, np.ndarray) and keys.view(np.uint32).max() <= _INFINITY:
        return keys  # none is negative, as magnitudes are: one look is enough
    lowest = keys.min()
    if lowest < 0:
        sign = keys >> 31
        keys = ((keys & 0x7FFFFFFF) ^ sign) - sign
        lowest = keys.min()
    if keys.max() > _INFINITY or lowest < -_INFINITY:
        raise ValueError(f"the score of {name} is not a number")
    return keys


def places_of(found: Array) -> Array:
    """Where `found` is `True`."""
    return found.nonzero().flatten() if isinstance(found, Tensor) else np.flatnonzero(found)


def count_true(found: Array) -> int:
    """How many are `True`."""
    return int(torch.count_nonzero(found) if isinstance(found, Tensor) else np.count_nonzero(found))


def joined(parts: Sequence[Array]) -> Array:
    """The keys of all parts, at least one, in one array."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return np.concatenate(parts)


def largest(keys: Array, count: int) -> int:
    """The `count`-th largest key."""
    place = len(keys) - count
    if isinstance(keys, Tensor):
        return int(keys.kthvalue(place + 1).values)
    return int(np.partition(keys, place)[place])
