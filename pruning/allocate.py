"""How many weights each layer keeps, and which: from scores to masks with exact counts."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from data.errors import UserError
from data.order import random_choice, stream_seed
from pruning.densities import Shapes, require_some, some_for
from pruning.densities import count_for as count_for
from pruning.densities import erk as erk
from pruning.densities import exact as exact
from pruning.masks import Masks
from pruning.select import select_largest
from pruning.shares import cut, join
from train.ranks import ALONE, Ranks

Scope = Literal["global", "layer"]


def keep_top(scores: Mapping[str, Tensor], density: float, scope: Scope = "global") -> Masks:
    """Masks of exactly `density` of the weights: the highest scores over all layers, or per layer.

    Ties break by layer order, then by flat index. Raises `UserError` for a density outside
    (0, 1] or one that leaves nothing, `ValueError` for a score that is NaN.
    """
    sizes = {name: score.numel() for name, score in scores.items()}
    if scope == "global":
        return keep_count(scores, some_for(density, sum(sizes.values())))
    counts = {name: count_for(density, size) for name, size in sizes.items()}
    require_some(density, counts, sizes)
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


def random_masks(shapes: Shapes, counts: Mapping[str, int], seed: int) -> Masks:
    """Masks of `counts[name]` weights of each layer at random places; equal on every machine.

    With the same seed, fewer weights are a part of more.
    """
    masks: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        flat = torch.zeros(math.prod(shape), dtype=torch.bool)
        places = random_choice(stream_seed(seed, name), len(flat), counts[name])
        flat[torch.from_numpy(places)] = True
        masks[name] = flat.view(shape)
    return Masks(masks)


def shuffle_layers(masks: Masks, seed: int) -> Masks:
    """Each layer keeps as many weights as before, at random places; equal on every machine."""
    shapes = {row.name: row.shape for row in masks.table()}
    shuffled = random_masks(shapes, {row.name: row.kept for row in masks.table()}, seed)
    return Masks({name: mask.to(masks[name].device) for name, mask in shuffled.items()})


def _after_pruning(survivors: int, fraction: float) -> int:
    return survivors - math.ceil(exact(fraction) * survivors)
