"""How masks change in training: the configuration, and what is refused before anything is trained.

`pruning.dynamic` has the methods, `pruning.dynamic_program` the stage of a run.
"""

from dataclasses import dataclass
from typing import Literal

from data.errors import UserError
from pruning.allocate import Scope
from pruning.masks import prunable
from pruning.options import check_controls, check_densities, densest_first, refuse_average
from pruning.sources import Outlook, Promise
from train.duration import check_durations, check_lengths
from train.models import ModelSpec
from train.settings import Settings

Method = Literal["set", "rigl", "gmp"]
Densities = Literal["uniform", "erk"]
Control = Literal["static"]
_REWIRING = ("fraction", "until")
_RAMP = ("start", "stop", "initial", "scope")


@dataclass(frozen=True)
class DynamicConfig:
    """Dynamic sparse training: masks that change while the weights are trained."""

    method: Method = "rigl"
    """set (random growth), rigl (growth by gradients), or gmp (gradual magnitude pruning, from the
    dense network)"""
    density: tuple[float, ...] = (0.2,)
    """the fraction kept; several are trained one after the other, the largest first"""
    densities: Densities | None = None
    """of the layers: uniform, or erk, by their dimensions; by default erk, of gmp uniform"""
    interval: str = "100it"
    """dT: time from one change of the masks to the next"""
    fraction: float | None = None
    """set, rigl: share of each layer's weights that a change moves, zeta or alpha; by default 0.3;
    of rigl it falls by a cosine"""
    until: str | None = None
    """set, rigl: T_end, from which on nothing changes; by default 75%, of set 100%"""
    start: str | None = None
    """gmp: when it first prunes; by default init"""
    stop: str | None = None
    """gmp: when it last prunes; by default 75%"""
    initial: float | None = None
    """gmp: the density at `start`; by default 1"""
    scope: Scope | None = None
    """gmp: prune each layer to its density, or rank the weights of all; by default layer"""
    exclude: tuple[str, ...] = ()
    """patterns of the names of layers that stay dense, such as conv1"""
    controls: tuple[Control, ...] = ()
    """what to train beside each ticket: static (the initial random masks, which stay)"""

    def __post_init__(self) -> None:
        check_lengths(self, "interval")
        check_durations(self, "until", "start", "stop")
        check_densities(self.density)
        check_controls(self.controls)
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"fraction = {self.fraction}: must be between 0 and 1")
        if self.initial is not None and not 0 < self.initial <= 1:
            raise ValueError(f"initial = {self.initial}: must be above 0 and at most 1")
        self._check_method()

    def _check_method(self) -> None:
        """Raises `ValueError` for an option of another method."""
        gradual = self.method == "gmp"
        for name in _REWIRING if gradual else _RAMP:
            if getattr(self, name) is not None:
                others = "method = 'set' or 'rigl'" if gradual else "method = 'gmp'"
                raise ValueError(f"{name} = {getattr(self, name)!r}: needs {others}")
        if gradual and self.controls:
            raise ValueError("controls = ['static']: gmp has no initial random masks; leave it out")
        if self.scope == "global" and self.densities is not None:
            raise ValueError(
                f"densities = {self.densities!r}: needs scope = 'layer', since a global ranking "
                "chooses the densities of the layers"
            )
        if self.initial is not None and self.initial < max(self.density):
            raise ValueError(
                f"initial = {self.initial}: must be at least the density, {max(self.density)}"
            )

    @property
    def levels(self) -> tuple[float, ...]:
        """The densities from the largest on: level 0 is that."""
        return densest_first(self.density)

    @property
    def layer_densities(self) -> Densities:
        """How the layers share a density: `densities`, or the default of the method."""
        return self.densities or ("uniform" if self.method == "gmp" else "erk")

    @property
    def moved(self) -> float:
        """zeta or alpha."""
        return 0.3 if self.fraction is None else self.fraction

    @property
    def end(self) -> str:
        """T_end, or the last pruning, as a duration."""
        if self.method == "gmp":
            return self.stop or "75%"
        return self.until or ("100%" if self.method == "set" else "75%")

    @property
    def begin(self) -> str:
        """The first pruning, as a duration."""
        return self.start or "init"


def foresee_dynamic(
    stage: str, config: DynamicConfig, settings: Settings, outlook: Outlook
) -> Promise:
    """What the stage will have made. Raises `UserError` for what is known to fail."""
    refuse_average(stage, settings, "an average of weights does not follow masks that change")
    spec = ModelSpec.of(settings.model, num_classes=10, in_chans=3)
    try:
        prunable(spec.outline(), config.exclude)
    except UserError as error:
        raise UserError(f"stages.{stage}: {settings.model.name}: {error}") from None
    return Promise(dict.fromkeys(range(len(config.density)), settings.model))
