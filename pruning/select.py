"""The `count` largest of many scores, exactly, in two passes over their bits.

A float's bits, read as an integer, are ordered as the floats are (after one flip for negative
ones). So a histogram over the upper 16 bits finds the bucket of the threshold, one over the lower
16 bits within it finds the threshold itself: no sort, no copy of all scores, and no rounding.
Ties at the threshold are kept in layer order, then by flat index.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_CHUNK = 1 << 20
_BUCKETS = 1 << 16


def select_largest(
    scores: Mapping[str, Tensor], count: int, within: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Bool tensors that are `True` at exactly the `count` largest scores.

    `scores`: float tensors, compared in float32, in layer order. `within`: bool tensors of the
    same shapes; where they are `False`, nothing is selected. Raises `ValueError` for a NaN, or a
    `count` that is not between 0 and the number of candidates.
    """
    available = sum(s.numel() for s in scores.values())
    if within is not None:
        available = sum(int(within[name].sum()) for name in scores)
    if not 0 <= count <= available:
        raise ValueError(f"cannot select {count} of {available} scores")
    for name, score in scores.items():
        if bool(torch.isnan(score).any()):
            raise ValueError(f"the score of {name} is not a number")
    if count == 0:
        return {name: torch.zeros_like(s, dtype=torch.bool) for name, s in scores.items()}
    upper, above = _bucket(_histogram(scores, within, None), count)
    lower, tied_above = _bucket(_histogram(scores, within, upper), count - above)
    threshold = upper << 16 | lower
    num_ties = count - above - tied_above
    selected: dict[str, Tensor] = {}
    for name, score in scores.items():
        order = _order(score)
        candidate = torch.ones_like(order, dtype=torch.bool) if within is None else within[name]
        ties = (order == threshold) & candidate
        first_ties = ties & (ties.flatten().cumsum(0).view_as(ties) <= num_ties)
        num_ties -= int(first_ties.sum())
        selected[name] = ((order > threshold) & candidate) | first_ties
    return selected


def _order(score: Tensor) -> Tensor:
    """Integers in [0, 2^32), ordered as the scores are: `int64` of the same shape."""
    bits = (score.float().contiguous() + 0.0).view(torch.int32).long()  # + 0.0: no negative zero
    return torch.where(bits < 0, ~bits & 0x7FFFFFFF, bits + 0x80000000)


def _histogram(
    scores: Mapping[str, Tensor], within: Mapping[str, Tensor] | None, upper: int | None
) -> Tensor:
    """Counts by the upper 16 bits, or by the lower 16 of those whose upper bits are `upper`."""
    counts = torch.zeros(_BUCKETS, dtype=torch.int64)
    for order in _chunks(scores, within):
        digits = order >> 16
        if upper is not None:
            digits = order[digits == upper] & 0xFFFF
        counts += torch.bincount(digits, minlength=_BUCKETS).cpu()
    return counts


def _chunks(scores: Mapping[str, Tensor], within: Mapping[str, Tensor] | None) -> Iterator[Tensor]:
    for name, score in scores.items():
        parts = score.contiguous().flatten().split(_CHUNK)
        if within is None:
            yield from map(_order, parts)
        else:
            masks = within[name].contiguous().flatten().split(_CHUNK)
            for part, mask in zip(parts, masks, strict=True):
                yield _order(part[mask])


def _bucket(counts: Tensor, count: int) -> tuple[int, int]:
    """The highest bucket at or above which `count` scores lie, and how many lie above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, count))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above
