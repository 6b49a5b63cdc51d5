"""What a recursion gains by keeping what was learned: a level against a fresh dense network.

The paper on recursive growth (2109.03862) has curves and no measure; these are ours. A curve is the
held-out accuracy by the steps of a level's training before its pruning, from the insertion on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pruning.tickets import Ticket

_SHARE = 0.95
"""of the dense network's accuracy that is to be reached"""
Curve = Mapping[int, float]


@dataclass(frozen=True)
class Measures:
    """Of one ticket of a recursion; `None` for what is not known."""

    kept_ratio: float | None
    """kept weights of all that could be pruned, excluded layers included"""
    steps_to_95: int | None
    """until 95 % of the accuracy that the dense network ends with"""
    dense_steps_to_95: int | None
    """the same of the dense network itself"""
    early_area: float | None
    """area under the early curve, relative to the dense network's"""
    before: float | None
    """test accuracy just before the pruning"""
    after: float | None
    """and just after it"""
    recovery: float | None
    """the share of what the pruning cost that the training after it regained"""
    gap: float | None
    """test accuracy at the end less the dense network's"""


def measures(ticket: Ticket, dense: Ticket | None) -> Measures:
    """The measures of a ticket beside the dense network of its level, where there is one."""
    about, test = ticket.metrics.get("growth", {}), ticket.metrics.get("test", {})
    before, after = test.get("accuracy_before_pruning"), test.get("accuracy_after_pruning")
    end, curve, early = test.get("accuracy"), _curve(ticket), about.get("early_steps")
    dense_end, dense_curve = _held_out(dense), _curve(dense)
    return Measures(
        kept_ratio=about.get("kept_ratio"),
        steps_to_95=None if dense_end is None else steps_to(_SHARE * dense_end, curve),
        dense_steps_to_95=None if dense_end is None else steps_to(_SHARE * dense_end, dense_curve),
        early_area=None if early is None else early_area(curve, dense_curve, early),
        before=before,
        after=after,
        recovery=None if None in (before, after, end) else recovery(before, after, end),
        gap=_less(end, None if dense is None else dense.metrics["test"]["accuracy"]),
    )


def steps_to(accuracy: float, curve: Curve) -> int | None:
    """The first step of a curve that reaches an accuracy."""
    return next((step for step, value in sorted(curve.items()) if value >= accuracy), None)


def early_area(curve: Curve, dense: Curve, until: float) -> float | None:
    """The area under a curve up to a step, by trapezoids, relative to that under another."""
    areas = [_area({s: v for s, v in one.items() if s <= until}) for one in (curve, dense)]
    return areas[0] / areas[1] if areas[1] else None


def recovery(before: float, after: float, end: float) -> float | None:
    """(end - after) / (before - after), where pruning cost anything."""
    return (end - after) / (before - after) if before > after else None


def _area(curve: Curve) -> float:
    points = sorted(curve.items())
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def _curve(ticket: Ticket | None) -> Curve:
    found: dict[str, Any] = {} if ticket is None else ticket.metrics.get("curve", {})
    return {
        int(step): value for step, value in found.items() if step.isdecimal() and value is not None
    }


def _held_out(ticket: Ticket | None) -> float | None:
    """The accuracy at the end, on the split of the curves."""
    if ticket is None:
        return None
    accuracy: float | None = ticket.metrics.get("validation", ticket.metrics["test"])["accuracy"]
    return accuracy


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
