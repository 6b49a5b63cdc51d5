"""How early-bird tickets are drawn: the configuration, and what is refused beforehand.

`pruning.earlybird_program` has the program.
"""

import math
from dataclasses import dataclass
from typing import Literal

from data.errors import UserError
from pruning.channels import Of, count_channels, scaled_layers
from pruning.options import check_densities, densest_first, refuse_basis
from pruning.sources import Outlook, Promise
from train.duration import check_durations
from train.models import ModelSpec
from train.settings import Settings

Control = Literal["random"]


@dataclass(frozen=True)
class EarlyBirdConfig:
    """Early-bird tickets: channels, drawn from the dense network as soon as they hardly change."""

    density: tuple[float, ...] = (0.5,)
    """the fraction kept; several are drawn in one search, and trained the largest first"""
    of: Of = "channels"
    """what it is a fraction of: channels, or weights (the most channels that are no denser)"""
    interval: str = "1ep"
    """time from one look at the channels to the next"""
    distance: float = 0.1
    """a ticket is drawn when the newest mask differs from each of the four before it in at most
    this share of the channels"""
    search: str = "100%"
    """for how long tickets are searched, at most"""
    penalty: float = 1e-4
    """lambda of the search: lambda * sign(gamma) is added to the gradients of the scales"""
    controls: tuple[Control, ...] = ()
    """what to train beside each ticket, from its weights: random (as many channels in each layer,
    at random)"""

    def __post_init__(self) -> None:
        check_durations(self, "interval", "search")
        check_densities(self.density)
        if not 0 <= self.distance < 1:
            raise ValueError(f"distance = {self.distance}: must be at least 0 and below 1")
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"penalty = {self.penalty}: must not be negative")

    @property
    def densities(self) -> tuple[float, ...]:
        """From the densest on: level 0 is that."""
        return densest_first(self.density)


def foresee_earlybird(
    stage: str, config: EarlyBirdConfig, settings: Settings, outlook: Outlook
) -> Promise:
    """What the stage will have made. Raises `UserError` for what is known to fail."""
    refuse_basis(stage, settings, "a filter of coefficients is no channel")
    outline = ModelSpec.of(settings.model, num_classes=10, in_chans=3).outline()
    try:
        layers, named = scaled_layers(outline), dict(outline.named_parameters())
        if config.of == "channels":
            num_channels = sum(named[scale].numel() for scale in layers.values())
            count_channels(min(config.density), num_channels, len(layers))
    except UserError as error:
        raise UserError(f"stages.{stage}: {settings.model.name}: {error}") from None
    levels = dict.fromkeys(range(len(config.density)), settings.model)
    return Promise(levels, of_channels=True)
