"""How many weights each layer keeps, and which: from scores to masks with exact counts."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from data.errors import UserError
from data.order import random_permutation, stream_seed
from pruning.masks import Masks
from pruning.select import select_largest
from pruning.shares import cut, join
from train.ranks import ALONE, Ranks

Scope = Literal["global", "layer"]


def count_for(density: float, size: int) -> int:
    """`density` of `size` weights, rounded to the nearest. Raises `UserError` outside (0, 1]."""
    if not 0 < density <= 1:
        raise UserError(f"density = {density}: must be above 0 and at most 1")
    return math.floor(exact(density) * size + Fraction(1, 2))


def keep_top(scores: Mapping[str, Tensor], density: float, scope: Scope = "global") -> Masks:
    """Masks of exactly `density` of the weights: the highest scores over all layers, or per layer.

    Ties break by layer order, then by flat index. Raises `UserError` for a density outside
    (0, 1] or one that leaves nothing, `ValueError` for a score that is NaN.
    """
    sizes = {name: score.numel() for name, score in scores.items()}
    if scope == "global":
        count = count_for(density, sum(sizes.values()))
        if count == 0:
            raise UserError(f"density = {density} keeps none of {sum(sizes.values())} weights")
        return keep_count(scores, count)
    counts = {name: count_for(density, size) for name, size in sizes.items()}
    for name, count in counts.items():
        if count == 0:
            raise UserError(
                f"density = {density} keeps none of the {sizes[name]} weights of {name}"
            )
    return keep_counts(scores, counts)


def keep_count(
    scores: Mapping[str, Tensor],
    count: int,
    within: Masks | None = None,
    ranks: Ranks = ALONE,
) -> Masks:
    """Masks of the `count` highest scores over all layers, chosen `within` what is left.

    Several `ranks`, which all give the same, rank a share each, and all get the same masks.
    """
    if ranks.world_size == 1:
        return Masks(select_largest(scores, count, within))
    candidates = None if within is None else cut(within, ranks)
    return Masks(join(select_largest(cut(scores, ranks), count, candidates, ranks), scores, ranks))


def keep_counts(
    scores: Mapping[str, Tensor],
    counts: Mapping[str, int],
    within: Masks | None = None,
    ranks: Ranks = ALONE,
) -> Masks:
    """Masks of the `counts[name]` highest scores in each layer; `ranks` as in `keep_count`."""
    masks: dict[str, Tensor] = {}
    for name, score in scores.items():
        candidates = None if within is None else Masks({name: within[name]})
        masks |= keep_count({name: score}, counts[name], candidates, ranks)
    return Masks(masks)


def prune_fraction(
    scores: Mapping[str, Tensor],
    masks: Masks,
    fraction: float,
    scope: Scope = "global",
    ranks: Ranks = ALONE,
) -> Masks:
    """One round of iterative pruning: of R survivors, the ceil(fraction * R) lowest scores go.

    Frankle and Carbin 2019 (1803.03635). Over all layers, or of each layer its own share; `ranks`
    as in `keep_count`. Raises `UserError` for a fraction outside [0, 1], `ValueError` for scores
    of other weights or NaN.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"fraction = {fraction}: must be between 0 and 1")
    if scores.keys() != masks.keys():
        unlike = sorted(scores.keys() ^ masks.keys())
        raise ValueError(f"scores and masks of different weights: {', '.join(unlike[:3])}")
    if scope == "global":
        return keep_count(scores, _after_pruning(masks.kept, fraction), masks, ranks)
    counts = {row.name: _after_pruning(row.kept, fraction) for row in masks.table()}
    return keep_counts(scores, counts, masks, ranks)


def shuffle_layers(masks: Masks, seed: int) -> Masks:
    """Each layer keeps as many weights as before, at random places; equal on every machine."""
    shuffled: dict[str, Tensor] = {}
    for row in masks.table():
        flat = torch.zeros(row.size, dtype=torch.bool)
        places = random_permutation(stream_seed(seed, row.name), row.size)[: row.kept]
        flat[torch.from_numpy(places)] = True
        shuffled[row.name] = flat.view(row.shape).to(masks[row.name].device)
    return Masks(shuffled)


def _after_pruning(survivors: int, fraction: float) -> int:
    return survivors - math.ceil(exact(fraction) * survivors)


def exact(number: float) -> Fraction:
    """The decimal number that was written, so that 0.1 of 30 is 3 and not a little more."""
    return Fraction(str(number))
