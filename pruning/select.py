"""The `count` largest of many scores, exactly, on one rank or on many: no sort, no copy of all.

A histogram over the upper 16 bits of the scores' keys (`pruning/keys.py`) finds the bucket of the
threshold, one over the lower 16 bits within it the threshold itself, without rounding. A sample
tells beforehand in which few buckets the threshold should lie. One pass over all scores then
selects what lies above these and takes out the keys within, so that only those are counted and
chosen among; where the sample was wrong, or too many lie within, all are. A rank that is alone
partitions the few keys instead of counting them.

With several ranks each holds a share of every layer, counts are summed over the ranks, and nothing
else is exchanged. Ties at the threshold are kept in layer order, then by flat index, where a
layer's shares follow each other in rank order.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pruning.keys import (
    HIGHEST,
    LOWEST,
    Array,
    Chunk,
    Layers,
    count_true,
    joined,
    largest,
    places_of,
)
from train.ranks import ALONE, Ranks

_SAMPLE = 1 << 18
_BUCKETS = 1 << 16
_FEW = 1 << 18  # so many keys may always be held, and are worth a count of their own
_HELD = 16  # else at most every 16th key is held


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
    layers = Layers(scores, within)
    available = _agree(layers, count, ranks)
    selected = {
        name: torch.empty(s.shape, dtype=torch.bool, device=s.device) for name, s in scores.items()
    }
    if count == 0:  # a NaN is refused all the same
        ranks.together(lambda: sum(len(chunk.keys) for chunk in layers.chunks()))
        return {name: mask.zero_() for name, mask in selected.items()}
    between, above = _narrow(layers, selected, count, available, ranks)
    threshold, num_ties = _threshold(between, count - above, ranks)
    ties = ranks.together(lambda: _mark(between, threshold))
    kept_ties = _share_out(num_ties, ties)[ranks.rank]
    for name, found, kept in zip(scores, ties[ranks.rank], kept_ties, strict=True):
        if kept < found:
            _drop_ties(between, name, threshold, kept)
    between.finish()
    return selected


def _agree(layers: Layers, count: int, ranks: Ranks) -> int:
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


class _Held(NamedTuple):
    """What was taken out of a chunk, as a chunk of its own, and where it goes back."""

    chunk: Chunk
    marks: Array
    places: Array


class _Between:
    """The candidates from one key to another: held where they are few, else read again."""

    def __init__(self, layers: Layers, selected: Mapping[str, Tensor], low: int, high: int) -> None:
        self._layers, self._selected, self._low, self._high = layers, selected, low, high
        self._held: list[_Held] | None = None

    @property
    def names(self) -> Collection[str]:
        return self._selected.keys()

    @property
    def are_held(self) -> bool:
        """Whether they are few, and taken out."""
        return self._held is not None

    def take(self) -> Tensor:
        """Selects what lies above; how many that are, and how many candidates lie between."""
        num_above, num_between = 0, 0
        held: list[_Held] = []
        most = max(_FEW, self._layers.size // _HELD)
        for chunk in self._layers.chunks(marks=self._selected):
            above = chunk.which(chunk.keys > self._high)
            places = places_of(chunk.which(chunk.keys >= self._low) ^ above)
            chunk.marks[...] = above
            num_above += count_true(above)
            num_between += len(places)
            if num_between <= most:
                taken = Chunk(chunk.name, chunk.keys[places], None, above[places])
                held.append(_Held(taken, chunk.marks, places))
            else:
                held.clear()
        self._held = held if num_between <= most else None
        return torch.tensor([num_above, num_between])

    def chunks(self, names: Collection[str] | None = None) -> Iterable[Chunk]:
        """What is held, or else all of the layers (default: of all)."""
        if self._held is None:
            return self._layers.chunks(names, marks=self._selected)
        return (h.chunk for h in self._held if names is None or h.chunk.name in names)

    def found(self) -> Iterator[Array]:
        """The candidates' keys, part by part."""
        for chunk in self.chunks():
            keys = chunk.candidates()
            yield keys if self.are_held else keys[(keys >= self._low) & (keys <= self._high)]

    def finish(self) -> None:
        """Writes the marks of what is held to where it was taken."""
        for chunk, marks, places in self._held or ():
            marks[places] = chunk.marks


def _narrow(
    layers: Layers, selected: Mapping[str, Tensor], count: int, available: int, ranks: Ranks
) -> tuple[_Between, int]:
    """Candidates among which the threshold is, and how many lie above them; on all ranks."""
    between = _Between(layers, selected, *_guess(layers, count, available, ranks))
    above, num_between = _summed(between.take, ranks).tolist()
    if above < count <= above + num_between:
        return between, above
    return _Between(layers, selected, LOWEST, HIGHEST), 0


def _threshold(between: _Between, count: int, ranks: Ranks) -> tuple[int, int]:
    """The smallest key of the `count` largest, and how many of them have just that key."""
    if between.are_held and ranks.world_size == 1:
        keys = joined(list(between.found()))
        threshold = largest(keys, count)
        return threshold, count - count_true(keys > threshold)
    digits = (_upper(keys) for keys in between.found())
    bucket, above = _bucket(_summed(lambda: _histogram(digits), ranks), count)
    tails = (keys[_upper(keys) == bucket] & 0xFFFF for keys in between.found())
    tail, tied_above = _bucket(_summed(lambda: _histogram(tails), ranks), count - above)
    return _first_key(bucket) + tail, count - above - tied_above


def _guess(layers: Layers, count: int, available: int, ranks: Ranks) -> tuple[int, int]:
    """The keys between which the threshold should lie, by a sample; it does if that is all."""
    if available <= _FEW:
        return LOWEST, HIGHEST
    stride = max(1, available // _SAMPLE)
    digits = (_upper(chunk.candidates()) for chunk in layers.chunks(stride=stride))
    counts = _summed(lambda: _histogram(digits), ranks)
    size = int(counts.sum())
    expected = count * size / available
    margin = 0.0 if stride == 1 else 1 + 2 * math.sqrt(size)  # four deviations at the median
    low, high = LOWEST, HIGHEST
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
        if size >= _FEW:
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


def _mark(between: _Between, threshold: int) -> list[int]:
    """Selects the candidates from `threshold` on; how many of each layer lie on it."""
    ties = dict.fromkeys(between.names, 0)
    for chunk in between.chunks():
        chunk.marks[...] = chunk.which(chunk.keys >= threshold)
        ties[chunk.name] += count_true(chunk.which(chunk.keys == threshold))
    return list(ties.values())


def _share_out(num_kept: int, ties: list[list[int]]) -> list[list[int]]:
    """How many ties are kept, by rank and layer: the first `num_kept`, layer by layer."""
    kept = [[0] * len(of_rank) for of_rank in ties]
    for layer in range(len(ties[0])):
        for rank, of_rank in enumerate(ties):
            kept[rank][layer] = min(num_kept, of_rank[layer])
            num_kept -= kept[rank][layer]
    return kept


def _drop_ties(between: _Between, name: str, threshold: int, num_kept: int) -> None:
    """Takes back what lies on the threshold in a layer, but for the first `num_kept`."""
    for chunk in between.chunks([name]):
        tied = chunk.which(chunk.keys == threshold)
        chunk.marks[tied & (tied.cumsum(0) > num_kept)] = False
        num_kept = max(0, num_kept - count_true(tied))
