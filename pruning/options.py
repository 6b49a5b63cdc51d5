"""What several recipes ask of their options alike."""

from collections.abc import Sequence

from data.errors import UserError
from train.settings import Settings


def check_densities(densities: Sequence[float], *, least: int = 1) -> None:
    """For `__post_init__`: raises `ValueError` unless all are in (0, 1], enough, and differ."""
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"density = {density}: must be above 0 and at most 1")
    if len(set(densities)) < max(least, len(densities)):
        wanted = "give at least one, and each once" if least else "give each once"
        raise ValueError(f"density = {list(densities)}: {wanted}")


def check_controls(controls: Sequence[str]) -> None:
    """For `__post_init__`: raises `ValueError` where one is named twice."""
    if len(set(controls)) < len(controls):
        raise ValueError(f"controls = {list(controls)}: name each once")


def densest_first(densities: Sequence[float]) -> tuple[float, ...]:
    """In the order of the levels: level 0 is the densest, the last one the sparsest."""
    return tuple(sorted(densities, reverse=True))


def refuse_average(stage: str, settings: Settings, reason: str) -> None:
    """Raises `UserError` where `train.ema` is set, which the method cannot have."""
    if settings.train.ema is not None:
        raise UserError(f"stages.{stage}: train.ema = {settings.train.ema}: {reason}; leave it out")


def refuse_basis(stage: str, settings: Settings, reason: str) -> None:
    """Raises `UserError` where `model.basis` is set, with which the method cannot be."""
    basis = settings.model.basis
    if basis not in (None, "identity"):
        raise UserError(f"stages.{stage}: model.basis = {basis!r}: {reason}; leave it out")
