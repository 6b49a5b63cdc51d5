"""The largest scores on a GPU, without waiting for it: for what is chosen in every step.

`pruning.select` counts on the host, which costs a GPU a wait for each count. Here everything stays
on the device: the threshold is the smallest of the top `count`, and of what lies on it the first
are kept. It takes some bytes for each score, where `pruning.select` takes none.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def select_largest_of_each(
    scores: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Bool tensors that are `True` at exactly the `counts[name]` largest scores of each.

    Ties are kept by flat index. Raises `ValueError` for a score that is NaN; it waits for the
    device once, for that.
    """
    masks = {name: _largest(score, counts[name]) for name, score in scores.items()}
    broken = torch.stack([score.isnan().any() for score in scores.values()])
    if bool(broken.any()):
        name = list(scores)[int(broken.int().argmax())]
        raise ValueError(f"the score of {name} is not a number")
    return masks


def select_largest_of_all(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The same over all scores at once, ties in layer order."""
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    mask = select_largest_of_each({"all layers": flat}, {"all layers": count})["all layers"]
    parts = mask.split([score.numel() for score in scores.values()])
    return {n: part.view(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}


def _largest(score: Tensor, count: int) -> Tensor:
    flat = score.detach().flatten()
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
    threshold = flat.topk(count, sorted=False).values.min()
    above, tied = flat > threshold, flat == threshold
    room = count - above.sum()
    return (above | (tied & (tied.cumsum(0) <= room))).view(score.shape)
