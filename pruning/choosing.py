"""Which weights are kept by their scores: a share of each layer, or of all layers at once."""

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from data.errors import UserError
from pruning.allocate import Scope, exact, keep_count, keep_counts
from pruning.device_select import select_largest_of_all, select_largest_of_each
from pruning.masks import Masks


def num_kept(density: float, size: int) -> int:
    """How many of `size` weights are kept: at least one. Raises `UserError` outside (0, 1]."""
    if not 0 < density <= 1:
        raise UserError(f"density = {density}: must be above 0 and at most 1")
    return size - math.floor((1 - exact(density)) * Fraction(size))


def choose(
    scores: Mapping[str, Tensor],
    density: float | Mapping[str, int],
    scope: Scope = "layer",
    least: int = 1,
) -> Masks:
    """Masks of the largest `|scores|`: of each layer its share, or over all layers at once.

    `density` may tell instead how many weights each layer keeps. With `scope = "global"` each
    layer keeps at least `least` weights (or all, if it has fewer), and the rest is shared out by
    one threshold; the count over all layers is exact. Raises `UserError` for a density outside
    (0, 1] or too small for that, and on the CPU `ValueError` for a score that is NaN; on a GPU that
    is for the caller to notice, since nothing here waits for it.
    """
    magnitudes = {name: value.detach().abs() for name, value in scores.items()}
    if isinstance(density, Mapping):
        return _largest_of_each(magnitudes, density)
    if scope == "layer":
        sizes = {name: value.numel() for name, value in magnitudes.items()}
        return _largest_of_each(
            magnitudes, {n: num_kept(density, size) for n, size in sizes.items()}
        )
    return _choose_globally(magnitudes, density, least)


def require_enough(density: float, sizes: Mapping[str, int], least: int) -> int:
    """How many weights are kept over all layers.

    Raises `UserError` where that is less than `least` in each (or all, where there are fewer).
    """
    size, needed = sum(sizes.values()), sum(min(least, size) for size in sizes.values())
    count = num_kept(density, size)
    if count < needed:
        raise UserError(
            f"density = {density} keeps {count} of {size} weights, and {least} in each of "
            f"{len(sizes)} layers are {needed}: keep more"
        )
    return count


def _choose_globally(magnitudes: Mapping[str, Tensor], density: float, least: int) -> Masks:
    """The largest `least` of each layer come before all others: the same as to take a layer that
    one threshold leaves too little to out of the ranking, until none is."""
    sizes = {name: value.numel() for name, value in magnitudes.items()}
    count = require_enough(density, sizes, least)
    reserves = {name: min(least, size) for name, size in sizes.items()}
    first = _largest_of_each(magnitudes, reserves)
    ranked = {
        name: value.clamp(max=torch.finfo(value.dtype).max).masked_fill(first[name], math.inf)
        for name, value in magnitudes.items()
    }
    return _largest_of_all(ranked, count)


def _largest_of_each(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Masks:
    if on_device(scores):
        return Masks(select_largest_of_each(scores, counts))
    return keep_counts(scores, counts)


def _largest_of_all(scores: Mapping[str, Tensor], count: int) -> Masks:
    if on_device(scores):
        return Masks(select_largest_of_all(scores, count))
    return keep_count(scores, count)


def on_device(scores: Mapping[str, Tensor]) -> bool:
    """Whether choosing must not wait for the scores, as they are on a GPU."""
    return next(iter(scores.values())).device.type != "cpu"
