"""How far two masks agree, layer by layer."""

from dataclasses import dataclass

from pruning.masks import Masks


@dataclass(frozen=True)
class Overlap:
    """What two masks keep of one layer, or of all together."""

    name: str
    size: int
    first: int
    """kept by the first"""
    second: int
    common: int
    """kept by both"""
    expected: float
    """kept by both if each mask kept as many weights in each layer, at random"""

    @property
    def removed(self) -> int:
        """Kept by the first only."""
        return self.first - self.common

    @property
    def added(self) -> int:
        """Kept by the second only."""
        return self.second - self.common

    @property
    def iou(self) -> float:
        """Intersection over union (Jaccard index); 1 where both keep nothing."""
        union = self.first + self.second - self.common
        return self.common / union if union else 1.0

    @property
    def chance(self) -> float:
        """The IoU to be expected of two independent random masks with as many weights a layer."""
        union = self.first + self.second - self.expected
        return self.expected / union if union else 1.0


def overlaps(first: Masks, second: Masks) -> list[Overlap]:
    """The layers that both have, in the order of the first.

    Raises `ValueError` for a layer that has another shape in the other.
    """
    found = []
    for name in first:
        if name not in second:
            continue
        one, other = first[name], second[name].to(first[name].device)
        if one.shape != other.shape:
            raise ValueError(f"{name} is {tuple(one.shape)} and {tuple(other.shape)}")
        size, kept, kept_there = one.numel(), int(one.sum()), int(other.sum())
        expected = kept * kept_there / size if size else 0.0
        found.append(Overlap(name, size, kept, kept_there, int((one & other).sum()), expected))
    return found


def total(rows: list[Overlap]) -> Overlap:
    """All layers together."""
    return Overlap(
        "all",
        sum(row.size for row in rows),
        sum(row.first for row in rows),
        sum(row.second for row in rows),
        sum(row.common for row in rows),
        sum(row.expected for row in rows),
    )
