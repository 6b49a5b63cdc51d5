"""The `count` largest of many scores, exactly, on one rank or on many: no sort, no copy of all.

A float's bits, read as an integer, are ordered as the floats are (once negative ones are turned
round): its key. A histogram over the keys' upper 16 bits finds the bucket of the threshold, one
over the lower 16 bits within it finds the threshold itself, without rounding. A sample tells
beforehand in which few buckets the threshold should lie. One pass over all scores then counts what
lies above them and takes out the keys within, so that the histograms see only these; where the
sample was wrong, or too many lie within, they see all.

With several ranks each holds a share of every layer, counts are summed over the ranks, and nothing
else is exchanged. Ties at the threshold are kept in layer order, then by flat index, where a
layer's shares follow each other in rank order.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.ranks import ALONE, Ranks

_CHUNK = 1 << 18  # 1 MiB of keys: a core's cache
_GPU_CHUNK = 1 << 24
_SAMPLE = 1 << 18
_BUCKETS = 1 << 16
_INFINITY = 0x7F800000
_LOWEST, _HIGHEST = -(1 << 31), (1 << 31) - 1
_HELD = 16  # at most every 16th key is taken out

# A NumPy array on the CPU, where NumPy compares and extracts several times faster than torch; a
# tensor elsewhere. Only what both understand alike is asked of it.
Array = Any


def select_largest(
    scores: Mapping[str, Tensor],
    count: int,
    within: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Bool tensors that are `True` at exactly the `count` largest scores.

    `scores`: float tensors on one device, compared in float32, in layer order. `within`: bool
    tensors of the same shapes; where they are `False`, nothing is selected. With several `ranks`,
    these are the shares that this rank holds, of any shape, also empty, under the same names on
    all; so is what comes back. Raises `ValueError`, on all ranks alike, for a NaN, for a `count`
    that is not between 0 and the number of candidates, or where the ranks ask for different things.
    """
    layers = _Layers(scores, within)
    available = _agree(layers, count, ranks)
    if count == 0:  # a NaN is refused all the same
        ranks.together(lambda: sum(len(chunk.keys) for chunk in layers.chunks()))
        return {name: torch.zeros_like(s, dtype=torch.bool) for name, s in scores.items()}
    threshold, num_ties = _threshold(layers, count, available, ranks)
    selected = {
        name: torch.empty(s.shape, dtype=torch.bool, device=s.device) for name, s in scores.items()
    }
    ties = ranks.together(lambda: _mark(layers, threshold, selected))
    kept_ties = _share_out(num_ties, ties)[ranks.rank]
    for name, found, kept in zip(scores, ties[ranks.rank], kept_ties, strict=True):
        if kept < found:
            _drop_ties(layers, name, threshold, kept, selected[name])
    return selected


class _Chunk(NamedTuple):
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
class _Layers:
    """The scores that this rank holds, read as keys, in chunks of each layer's flat order."""

    scores: Mapping[str, Tensor]
    within: Mapping[str, Tensor] | None

    @property
    def size(self) -> int:
        return sum(score.numel() for score in self.scores.values())

    def num_candidates(self) -> int:
        """Raises `ValueError` where `within` has other shapes than the scores."""
        if self.within is None:
            return self.size
        for name, score in self.scores.items():
            if self.within[name].shape != score.shape:
                shapes = f"{tuple(self.within[name].shape)}, not {tuple(score.shape)}"
                raise ValueError(f"the candidates of {name} have the shape {shapes}")
        return sum(int(torch.count_nonzero(self.within[name])) for name in self.scores)

    def chunks(
        self,
        names: Iterable[str] | None = None,
        stride: int = 1,
        marks: Mapping[str, Tensor] | None = None,
    ) -> Iterator[_Chunk]:
        """Every `stride`-th score of the layers (default: all). Raises `ValueError` for a NaN.

        `marks`: masks to be written, of which each chunk gets its part.
        """
        for name in self.scores if names is None else names:
            parts = _split(self.scores[name], stride)
            nothing = [None] * len(parts)
            candidates = nothing if self.within is None else _split(self.within[name], stride)
            marked = nothing if marks is None else _split(marks[name], stride)
            for score, candidate, mark in zip(parts, candidates, marked, strict=True):
                yield _Chunk(name, _keys(score, name), _array(candidate), _array(mark))


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
    lowest = keys.min()
    if lowest < 0:
        sign = keys >> 31
        keys = ((keys & 0x7FFFFFFF) ^ sign) - sign
        lowest = keys.min()
    if keys.max() > _INFINITY or lowest < -_INFINITY:
        raise ValueError(f"the score of {name} is not a number")
    return keys


def _agree(layers: _Layers, count: int, ranks: Ranks) -> int:
    """How many candidates there are on all ranks together.

    Raises `ValueError` where `count` is impossible, or the ranks want different things.
    """
    asked = ranks.together(lambda: (count, list(layers.scores), layers.num_candidates()))
    if any(request[:2] != asked[0][:2] for request in asked):
        raise ValueError("the ranks select different counts, or among different layers")
    available = sum(request[2] for request in asked)
    if not 0 <= count <= available:
        raise ValueError(f"cannot select {count} of {available} scores")
    return available


# The threshold --------------------------------------------------------------------------------


class _Between:
    """The candidates from one key to another: held where they are few, else read again."""

    def __init__(self, layers: _Layers, low: int, high: int) -> None:
        self._layers, self._low, self._high = layers, low, high
        self._held: list[Array] | None = None

    def take(self) -> Tensor:
        """How many candidates lie above, and how many between; holds these where they are few."""
        num_above, num_between = 0, 0
        held: list[Array] = []
        most = max(_CHUNK, self._layers.size // _HELD)
        for above, keys in map(self._divide, self._layers.chunks()):
            num_above += above
            num_between += len(keys)
            if num_between <= most:
                held.append(keys)
            else:
                held.clear()
        self._held = held if num_between <= most else None
        return torch.tensor([num_above, num_between])

    def __iter__(self) -> Iterator[Array]:
        if self._held is not None:
            return iter(self._held)
        return (keys for _, keys in map(self._divide, self._layers.chunks()))

    def _divide(self, chunk: _Chunk) -> tuple[int, Array]:
        above = chunk.which(chunk.keys > self._high)
        between = chunk.which(chunk.keys >= self._low) ^ above
        return _count(above), chunk.keys[between]


def _threshold(layers: _Layers, count: int, available: int, ranks: Ranks) -> tuple[int, int]:
    """The smallest key that is kept, and how many of the candidates that have it are."""
    between = _Between(layers, *_guess(layers, count, available, ranks))
    above, num_between = _summed(between.take, ranks).tolist()
    if not above < count <= above + num_between:
        between, above = _Between(layers, _LOWEST, _HIGHEST), 0
    digits = (_upper(keys) for keys in between)
    bucket, higher = _bucket(_summed(lambda: _histogram(digits), ranks), count - above)
    above += higher
    tails = (keys[_upper(keys) == bucket] & 0xFFFF for keys in between)
    tail, higher = _bucket(_summed(lambda: _histogram(tails), ranks), count - above)
    return _first_key(bucket) + tail, count - above - higher


def _guess(layers: _Layers, count: int, available: int, ranks: Ranks) -> tuple[int, int]:
    """The keys between which the threshold should lie, by a sample; it does if that is all."""
    stride = max(1, available // _SAMPLE)
    digits = (_upper(chunk.candidates()) for chunk in layers.chunks(stride=stride))
    counts = _summed(lambda: _histogram(digits), ranks)
    size = int(counts.sum())
    expected = count * size / available
    margin = 0.0 if stride == 1 else 1 + 3 * math.sqrt(size)  # six deviations at the median
    low, high = _LOWEST, _HIGHEST
    if expected + margin <= size:
        low = _first_key(_bucket(counts, math.ceil(expected + margin))[0])
    if expected - margin >= 1:
        high = _first_key(_bucket(counts, math.floor(expected - margin))[0]) + _BUCKETS - 1
    return low, high


def _upper(keys: Array) -> Array:
    """The upper halves of keys, as buckets from 0."""
    return (keys >> 16) + _BUCKETS // 2


def _first_key(bucket: int) -> int:
    return (bucket - _BUCKETS // 2) * _BUCKETS


def _histogram(parts: Iterable[Array]) -> Tensor:
    """How many of each digit there are: `[_BUCKETS]`."""
    counts = torch.zeros(_BUCKETS, dtype=torch.int64)
    for digits in _gathered(parts):
        counts += torch.bincount(digits, minlength=_BUCKETS).cpu()
    return counts


def _gathered(parts: Iterable[Array]) -> Iterator[Tensor]:
    """The same numbers in fewer parts: counting a small one costs as much as a chunk."""
    waiting: list[Tensor] = []
    size = 0
    for part in parts:
        waiting.append(torch.as_tensor(part))
        size += len(part)
        if size >= _CHUNK:
            yield torch.cat(waiting)
            waiting, size = [], 0
    if waiting:
        yield torch.cat(waiting)


def _summed(count: Callable[[], Tensor], ranks: Ranks) -> Tensor:
    """What `count` gives, summed over the ranks; where it fails on one, it fails on all."""
    counts: list[Tensor] = []
    ranks.together(lambda: counts.append(count()))
    if ranks.world_size == 1:
        return counts[0]
    has_cpu = "cpu:" in dist.get_backend_config(ranks.group)
    device = torch.device("cpu") if has_cpu else torch.accelerator.current_accelerator()
    return ranks.reduce(counts[0].to(device)).cpu()


def _bucket(counts: Tensor, count: int) -> tuple[int, int]:
    """The highest bucket at or above which `count` scores lie, and how many lie above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, count))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above


# The masks ------------------------------------------------------------------------------------


def _mark(layers: _Layers, threshold: int, selected: Mapping[str, Tensor]) -> list[int]:
    """Selects all candidates from `threshold` on; how many of each layer lie on it."""
    ties = dict.fromkeys(selected, 0)
    for chunk in layers.chunks(marks=selected):
        chunk.marks[...] = chunk.which(chunk.keys >= threshold)
        ties[chunk.name] += _count(chunk.which(chunk.keys == threshold))
    return list(ties.values())


def _share_out(num_kept: int, ties: list[list[int]]) -> list[list[int]]:
    """How many ties are kept, by rank and layer: the first `num_kept`, layer by layer."""
    kept = [[0] * len(of_rank) for of_rank in ties]
    for layer in range(len(ties[0])):
        for rank, of_rank in enumerate(ties):
            kept[rank][layer] = min(num_kept, of_rank[layer])
            num_kept -= kept[rank][layer]
    return kept


def _drop_ties(layers: _Layers, name: str, threshold: int, num_kept: int, mask: Tensor) -> None:
    """Takes what lies on the threshold out of a layer's `mask`, but for the first `num_kept`."""
    for chunk in layers.chunks([name], marks={name: mask}):
        tied = chunk.which(chunk.keys == threshold)
        chunk.marks[tied & (tied.cumsum(0) > num_kept)] = False
        num_kept = max(0, num_kept - _count(tied))


def _count(found: Array) -> int:
    """How many are `True`."""
    return int(torch.count_nonzero(found) if isinstance(found, Tensor) else np.count_nonzero(found))
