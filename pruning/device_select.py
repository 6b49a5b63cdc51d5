"""The largest scores on a GPU, without waiting for it: for what is chosen in every step.

`pruning.select` counts on the host, which costs a GPU a wait for each count. Here everything stays
on the device: a stable sort, which GPUs do faster than they find a threshold. It takes some bytes
for each score, where `pruning.select` takes none.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def select_largest_of_each(
    scores: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Bool tensors that are `True` at exactly the `counts[name]` largest scores of each.

    Ties are kept by flat index. A score that is NaN passes for the largest: to notice it would be
    to wait for the device.
    """
    return {name: _largest(score, counts[name]) for name, score in scores.items()}


def select_largest_of_all(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The same over all scores at once, ties in layer order."""
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    mask = select_largest_of_each({"all layers": flat}, {"all layers": count})["all layers"]
    parts = mask.split([score.numel() for score in scores.values()])
    return {n: part.view(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}


def _largest(score: Tensor, count: int) -> Tensor:
    flat = score.detach().flatten()
    order = flat.sort(descending=True, stable=True).indices  # stable: ties by flat index
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.index_fill_(0, order[:count], True).view(score.shape)
