"""How a network is pruned once, before its training or early in it: the configuration.

`pruning.initial_program` has the program.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

from data.errors import UserError, did_you_mean
from pruning.densities import SHARINGS, Shapes, some_for
from pruning.masks import prunable_shapes
from pruning.n_of_m import Misfits, Pattern
from pruning.options import check_controls, check_densities, densest_first, refuse_basis
from pruning.scores import SCORES, Images
from pruning.sources import Outlook, Promise
from train.duration import check_durations
from train.models import ModelSpec, shaped_by
from train.settings import Settings

Control = Literal["random"]
Densities = Literal["global", "uniform", "erk", "balanced"]
Kept = int | dict[str, int] | Pattern
"""of all weights, of each layer, or of each group"""
_NO_SCORES = ("synflow", "random")
"""which do not rank once by scores"""


@dataclass(frozen=True)
class InitialConfig:
    """Pruning at initialisation, or once early in training: masks by one score."""

    score: str = "snip"
    """what ranks the weights: magnitude, snip, grasp, synflow; or random"""
    density: tuple[float, ...] = ()
    """the fraction kept; several make a ticket each, the largest first"""
    densities: Densities = "global"
    """how the layers share it: ranked together (global), or each by itself with the same fraction
    (uniform), with Erdos-Renyi-Kernel's (erk), or with the same number of weights (balanced)"""
    pattern: str | None = None
    """instead of a density: 2:4 keeps two of every four weights along a layer's inputs"""
    misfits: Misfits = "refuse"
    """pattern: refuse layers whose inputs are not whole groups, or leave them dense"""
    at: str = "init"
    """k: the step at which the network is pruned, after training it densely up to there, and from
    which the tickets are trained; 1000it, 5ep, 5%, init"""
    num_batches: int = 1
    """snip: global batches over which the gradient is taken"""
    samples_per_class: int = 10
    """grasp: training images of each class (the authors' code: 25 on CIFAR)"""
    iterations: int = 100
    """synflow: in how many steps it prunes"""
    exclude: tuple[str, ...] = ()
    """patterns of the names of layers that stay dense, such as fc"""
    controls: tuple[Control, ...] = ()
    """what to train beside each ticket: random (the same number of weights in each layer, or the
    same pattern, at random)"""

    def __post_init__(self) -> None:
        check_durations(self, "at")
        known = [*SCORES, *_NO_SCORES]
        if self.score not in known:
            near = did_you_mean(self.score, known)
            raise ValueError(f"score = {self.score!r}: is not known{near} ({', '.join(known)})")
        self._check_densities()
        check_controls(self.controls)
        for name in ("num_batches", "samples_per_class", "iterations"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
            if not self._uses(name) and value != _DEFAULTS[name]:
                raise ValueError(f"{name} = {value}: score = {self.score!r} has no use for it")
        if self.score == "random" and self.controls:
            raise ValueError("controls = 'random': the tickets are random themselves; leave it out")

    def _check_densities(self) -> None:
        check_densities(self.density, least=0)
        if self.pattern is None:
            if not self.density:
                raise ValueError("density: give at least one, or a pattern")
            if self.misfits != "refuse":
                raise ValueError(f"misfits = {self.misfits!r}: needs a pattern")
            if self.score == "random" and self.densities == "global":
                raise ValueError(
                    "densities = 'global': random masks have no ranking over all layers; choose "
                    "uniform, erk or balanced"
                )
            return
        try:
            Pattern.parse(self.pattern)
        except ValueError as error:
            raise ValueError(f"pattern = {error}") from None
        if self.density or self.densities != "global":
            raise ValueError(
                f"pattern = {self.pattern!r}: gives each layer its density: leave out density and "
                "densities"
            )

    def _uses(self, option: str) -> bool:
        return {
            "num_batches": self.images == "batches",
            "samples_per_class": self.images == "classes",
            "iterations": self.score == "synflow",
        }[option]

    @property
    def images(self) -> Images:
        """Which images the score sees."""
        return SCORES[self.score].images if self.score in SCORES else "none"

    @property
    def num_levels(self) -> int:
        """The number of tickets, controls not counted."""
        return 1 if self.pattern is not None else len(self.density)

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights that are pruned, in layer order. Raises `UserError`."""
        return prunable_shapes(model, self.exclude)

    def kept(self, shapes: Shapes) -> list[Kept]:
        """What is kept, level by level. Raises `UserError` for what does not fit the layers."""
        if self.pattern is not None:
            pattern = Pattern.parse(self.pattern)
            if self.misfits == "refuse":
                pattern.require_fit(shapes)
            elif not any(map(pattern.fits, shapes.values())):
                raise UserError(
                    f"pattern = '{pattern}': fits no layer, so that all would stay dense: choose "
                    "one whose groups divide the layers' inputs"
                )
            return [pattern]
        densities = densest_first(self.density)
        if self.densities != "global":
            return [SHARINGS[self.densities](shapes, density) for density in densities]
        size = sum(map(math.prod, shapes.values()))
        return [some_for(density, size) for density in densities]


_DEFAULTS = {field.name: field.default for field in fields(InitialConfig)}


def foresee_initial(
    stage: str, config: InitialConfig, settings: Settings, outlook: Outlook
) -> Promise:
    """What the stage will have made. Raises `UserError` for what is known to fail."""
    if config.score == "synflow":
        refuse_basis(stage, settings, "SynFlow needs weights of one sign, not their coefficients")
    if config.pattern is not None:
        refuse_basis(stage, settings, "the zeros of a pattern would be coefficients, not weights")
    if settings.train.sync_batchnorm and config.images == "classes":
        raise UserError(
            f"stages.{stage}: train.sync_batchnorm = true: score = {config.score!r} sees images of "
            "each class, not as many on each rank, which have no common statistics; leave it out, "
            "or take another score"
        )
    spec = ModelSpec.of(settings.model, num_classes=10, in_chans=3)
    try:
        shapes = config.shapes(spec.outline())
        if config.pattern is not None and config.misfits == "refuse":
            stem = shaped_by(spec, "in_chans")  # of which only the data tell
            config.kept({name: shape for name, shape in shapes.items() if name not in stem})
    except UserError as error:
        raise UserError(f"stages.{stage}: {settings.model.name}: {error}") from None
    return Promise(dict.fromkeys(range(config.num_levels), settings.model))
