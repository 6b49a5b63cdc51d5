"""What legends and axes of pictures say: methods by their names, densities at readable places."""

from collections.abc import Sequence

METHODS = {
    "imp": "winning tickets",
    "elastic": "elastic tickets",
    "multiprize": "multi-prize tickets",
    "dual": "dual tickets",
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "magnitude": "magnitudes",
    "earlybird": "early-bird tickets",
    "set": "SET",
    "rigl": "RigL",
    "gmp": "gradual magnitude pruning",
    "random": "random masks",
    "static": "masks that stay",
    "budget": "random masks, trained longer",
    "growth": "grown tickets",
    "dense": "dense, fresh",
    "unpruned": "grown, not pruned",
    "ungrown": "pruned, not grown",
    "reset": "pruned and set back",
    "reset-budget": "pruned and set back, trained longer",
    "dense-budget": "dense, trained longer",
}
"""as plots call them: by the name of a ticket's method"""


def method_name(method: str, *, grown: bool = False) -> str:
    """What a legend calls a method; where networks grew, a random control inserted at random."""
    return "random insertions" if grown and method == "random" else METHODS.get(method, method)


def density_ticks(densities: Sequence[float], *, most: int = 7) -> list[float]:
    """At most so many of the densities, none too near to another."""
    ticks: list[float] = []
    for density in sorted(set(densities), reverse=True):
        if not ticks or density < ticks[-1] * 0.8:
            ticks.append(density)
    return ticks[:: -(-len(ticks) // most)]
