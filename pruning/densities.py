"""How many weights each layer keeps: a number of all weights, shared out among the layers.

Each way of sharing gives counts that sum exactly to the density of all weights, rounded to the
nearest: what is left over by rounding down goes to the layers with the largest remainders, of equal
ones to the first.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from data.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]


def exact(number: float) -> Fraction:
    """The decimal number that was written, so that 0.1 of 30 is 3 and not a little more."""
    return Fraction(str(number))


def count_for(density: float, size: int) -> int:
    """`density` of `size` weights, rounded to the nearest. Raises `UserError` outside (0, 1]."""
    if not 0 < density <= 1:
        raise UserError(f"density = {density}: must be above 0 and at most 1")
    return math.floor(exact(density) * size + Fraction(1, 2))


def some_for(density: float, size: int) -> int:
    """`count_for`, which also raises `UserError` where that is none."""
    count = count_for(density, size)
    if not count:
        raise UserError(f"density = {density} keeps none of {size} weights: keep more")
    return count


def require_some(density: float, counts: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Raises `UserError` naming the first layer of which a density keeps nothing."""
    for name, count in counts.items():
        if not count:
            raise UserError(
                f"density = {density} keeps none of the {sizes[name]} weights of {name}: keep "
                "more, or leave that layer dense with exclude"
            )


def uniform(shapes: Shapes, density: float) -> dict[str, int]:
    """The same fraction of each layer. `shapes`: weight name -> shape, in layer order.

    Raises `UserError` for a density outside (0, 1], or one that keeps nothing of a layer; so do
    the others here.
    """
    return _shared(shapes, density, lambda shape: Fraction(math.prod(shape)))


def erk(shapes: Shapes, density: float, power_scale: float = 1.0) -> dict[str, int]:
    """Erdos-Renyi-Kernel: a layer's density is eps * (sum(shape) / prod(shape)) ** power_scale.

    Mocanu et al. 2018 (Nature Communications 9:2383, equation 3), for convolutions Evci et al. 2020
    (1911.11134, section 3). eps is solved for the budget; a layer that would be more than dense is
    dense, and eps solved again for the rest.
    """

    def weight(shape: tuple[int, ...]) -> Fraction:
        ratio = Fraction(sum(shape), math.prod(shape))
        if power_scale != 1:
            ratio = Fraction(float(ratio) ** power_scale)
        return ratio * math.prod(shape)

    return _shared(shapes, density, weight)


def balanced(shapes: Shapes, density: float) -> dict[str, int]:
    """The same number of weights in each layer; one that is smaller is dense, the rest share.

    Gadhikar et al. 2023 (2210.02412), who name it so. In their code (`ER_same_params_per_layer`)
    each layer has density * size / num_layers, cut off at its size; what is cut off is not shared
    out, so that their network is sparser than was asked for.
    """
    return _shared(shapes, density, lambda shape: Fraction(1))


SHARINGS: dict[str, Callable[[Shapes, float], dict[str, int]]] = {
    "uniform": uniform,
    "erk": erk,
    "balanced": balanced,
}


def _shared(
    shapes: Shapes, density: float, weight: Callable[[tuple[int, ...]], Fraction]
) -> dict[str, int]:
    """Counts in proportion to the layers' weights, none above its size, summing to the budget."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = count_for(density, sum(sizes.values()))
    weights = {name: weight(shape) for name, shape in shapes.items()}
    shares = _capped(budget, weights, sizes)
    counts = {name: math.floor(share) for name, share in shares.items()}
    left = budget - sum(counts.values())
    order = sorted(counts, key=lambda name: counts[name] - shares[name])  # stable: ties in order
    for name in order[:left]:
        counts[name] += 1
    require_some(density, counts, sizes)
    return counts


def _capped(
    budget: int, weights: Mapping[str, Fraction], sizes: Mapping[str, int]
) -> dict[str, Fraction]:
    """`budget` in proportion to `weights`; what exceeds a layer's size goes to the others."""
    open_, dense, factor = dict(weights), dict[str, Fraction](), Fraction(0)
    while open_:
        factor = (budget - sum(dense.values(), Fraction(0))) / sum(open_.values(), Fraction(0))
        full = {name for name, weight in open_.items() if factor * weight > sizes[name]}
        if not full:
            break
        dense |= {name: Fraction(sizes[name]) for name in full}
        open_ = {name: weight for name, weight in open_.items() if name not in full}
    return {name: dense[name] if name in dense else factor * open_[name] for name in weights}
