"""How networks are grown: the configuration, and what is known of it before anything is trained.

`pruning.growth_program` has the program.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from data.errors import UserError
from pruning.growth import (
    Insertion,
    grown_spec,
    growth_of,
    insert,
    prunable_at,
    require_counts,
)
from pruning.masks import prunable
from pruning.options import refuse_basis
from pruning.sources import Outlook, Promise
from train.duration import check_durations
from train.models import ModelConfig, ModelSpec
from train.settings import Settings

Control = Literal["dense", "random", "unpruned", "ungrown", "reset", "reset-budget", "dense-budget"]
OF_LAST = ("reset", "reset-budget", "dense-budget")
"""the controls of the deepest network alone"""


@dataclass(frozen=True)
class GrowthConfig:
    """Recursive growth: train, prune, add a block, and go on with all that was learned."""

    recursions: int = 5
    """R: how many blocks are added, one after the other; there are R + 1 levels"""
    density: float = 0.05
    """the fraction that each layer keeps, once and for all"""
    insertion: Insertion = "literal"
    """the new block: literal (kernels and matrices are identities), preserving (it gives what it
    takes) or random"""
    grow: tuple[str, ...] = ()
    """stages that get a block in turn, as tombola tickets stages names them; by default the last"""
    exclude: tuple[str, ...] = ()
    """patterns of the names of layers that stay dense, such as fc"""
    recover: str = "50%"
    """how long each level is trained after it was pruned; before that it is train.total"""
    measure: str = "5%"
    """how often the held-out images are evaluated before the pruning, for the measures"""
    early: str = "20%"
    """how much of the training before the pruning counts as early"""
    ratio: float | None = None
    """stop growing once this share of all weights, excluded layers included, is kept at most ...;
    by default no limit"""
    tolerance: float | None = None
    """... and the held-out accuracy differs by this at most from the control dense's (default:
    grow R times)"""
    controls: tuple[Control, ...] = ()
    """beside each level: dense (a fresh network of its depth), random (random insertions), unpruned
    (growth alone), ungrown (pruning alone); beside the last: reset (the deepest network, trained,
    pruned and set back), reset-budget and dense-budget (for as many steps as the recursion)"""

    def __post_init__(self) -> None:
        check_durations(self, "recover", "measure", "early")
        if self.recursions < 1:
            raise ValueError(f"recursions = {self.recursions}: must be at least 1")
        for name in ("density", "ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} = {value}: must be above 0 and at most 1")
        if self.tolerance is not None and not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance = {self.tolerance}: must be between 0 and 1")
        if self.tolerance is not None and "dense" not in self.controls:
            raise ValueError(
                f"tolerance = {self.tolerance}: is from the dense network's accuracy: add 'dense' "
                "to controls"
            )
        if self.ratio is not None and self.tolerance is None:
            raise ValueError(f"ratio = {self.ratio}: has no effect without tolerance")
        for name in ("grow", "controls"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} = {list(values)}: name each once")

    @property
    def num_kinds(self) -> int:
        """In how many stages blocks are inserted: as many insertions show all there is to see."""
        return min(self.recursions, max(1, len(self.grow)))

    def spec(self, base: ModelSpec, depth: int) -> ModelSpec:
        """The network after so many growths. Raises `UserError` where it cannot grow."""
        return grown_spec(base, self.grow, depth)

    def check(self, base: ModelSpec) -> None:
        """Raises `UserError` where a network cannot grow so, or be pruned so."""
        deepest = self.spec(base, self.recursions).outline()
        prunable(deepest, self.exclude)
        require_counts(deepest, self.density, self.exclude)
        prunable_at(base.outline(), self.exclude)
        for depth in range(self.num_kinds):
            source, target = (self.spec(base, depth + n).outline() for n in (0, 1))
            insert(target, growth_of(source, target), self.insertion)


@contextlib.contextmanager
def told_of(stage: str) -> Iterator[None]:
    """To the user's mistakes adds the stage, and the option's section where one is named."""
    try:
        yield
    except (UserError, ValueError) as error:
        joint = "." if re.match(r"\w+ = ", str(error)) else ": "
        raise UserError(f"stages.{stage}{joint}{error}") from None


def foresee_growth(
    stage: str, config: GrowthConfig, settings: Settings, outlook: Outlook
) -> Promise:
    """What the stage will have made, at most: it may stop earlier. Raises `UserError`."""
    refuse_basis(stage, settings, "a new block is made of weights, not of their coefficients")
    base = ModelSpec.of(settings.model, num_classes=10, in_chans=3)
    with told_of(stage):
        depths = range(config.recursions + 1)
        models = {depth: _as_config(settings.model, config.spec(base, depth)) for depth in depths}
        config.check(base)
    return Promise(models)


def _as_config(model: ModelConfig, spec: ModelSpec) -> ModelConfig:
    blocks = spec.arguments.get("blocks")
    return replace(model, blocks=None if blocks is None else tuple(blocks))
