"""Early-bird tickets: the channels that will be kept are known long before the weights are trained.

You et al. 2020 (1909.11957), "Drawing Early-Bird Tickets". The dense network is trained with the
penalty of network slimming; now and then the channels that would be kept are looked at, and as soon
as they hardly change any more, the ticket is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.errors import RunError, UserError
from pruning.channels import Channels, Of
from pruning.densities import exact
from train.ranks import ALONE, Ranks
from train.watch import diverged

NUM_MASKS = 5
"""how many masks are compared: the newest with those before it"""


@dataclass(frozen=True)
class Search:
    """What is looked for, and how often."""

    channels: Channels
    densities: tuple[float, ...]
    interval: int
    """steps from one look to the next"""
    of: Of = "channels"
    distance: float = 0.1
    """up to which masks are alike: the share of all channels that are in one of two masks only"""
    penalty: float = 1e-4
    """lambda, on `|gamma|`"""


def are_alike(masks: Sequence[Tensor], distance: float) -> bool:
    """Whether there are five masks, and the newest is within `distance` of each of the others."""
    if len(masks) < NUM_MASKS:
        return False
    return max(differing(masks)) <= exact(distance) * masks[-1].numel()


def differing(masks: Sequence[Tensor]) -> list[int]:
    """In how many channels the newest mask differs from each of those before it; the Hamming
    distance, not normalised."""
    return [int((mask != masks[-1]).sum()) for mask in masks[:-1]]


class EarlyBird:
    """A `Sparsity` that masks nothing: a dense training in which tickets are drawn.

    Before each update lambda * sign(gamma) is added to the gradients, averaged over ranks, of the
    scales by which channels are ranked. After every `interval` steps the channels that each density
    would keep go into its queue of five masks, and it is drawn if these are alike; what is drawn
    stays so. Looks are the same on every rank, which is checked.
    """

    masks: Mapping[str, Tensor] = {}
    density = 1.0
    """nothing is masked yet"""

    def __init__(
        self, search: Search, model: nn.Module, optimizer: Optimizer, *, ranks: Ranks = ALONE
    ) -> None:
        self._search, self._ranks = search, ranks
        named = dict(model.named_parameters())
        self._scales = {name: named[name] for name in search.channels.shapes}
        self._queues: dict[float, list[Tensor]] = {density: [] for density in search.densities}
        self._drawn: dict[float, int] = {}

    @property
    def drawn(self) -> Mapping[float, int]:
        """Densities that are drawn, and after how many steps."""
        return self._drawn

    def distances(self, density: float) -> list[float]:
        """Of a density's newest mask from those before it, the oldest first."""
        queue = self._queues[density]
        return [count / queue[-1].numel() for count in differing(queue)] if queue else []

    def gradient_masks(self, step: int) -> Mapping[str, Tensor]:
        """All: nothing is masked yet."""
        return {}

    @torch.no_grad()
    def before_update(self, step: int) -> bool:
        """Adds the penalty's subgradient; never vetoes."""
        for scale in self._scales.values():
            if scale.grad is not None:
                scale.grad.add_(scale.sign(), alpha=self._search.penalty)
        return True

    def after_update(self, step: int) -> None:
        """Looks at the channels where that is due."""
        if (step + 1) % self._search.interval == 0:
            self._look(step + 1)

    def _look(self, step: int) -> None:
        """Raises `RunError` for a density that now is less than a channel a layer, for scales that
        are not finite, and on all ranks where they see different channels."""
        channels, of = self._search.channels, self._search.of
        scores = channels.scores(self._scales)
        for density, queue in self._queues.items():
            if density in self._drawn:
                continue
            try:
                kept = channels.keep(scores, density, of)
            except UserError as error:
                raise RunError(f"after {step} steps {error}, under another --name") from error
            except ValueError as error:
                raise diverged(step, error) from error
            self._ranks.require_same(kept.digest(), f"the channels after {step} steps")
            queue.append(torch.cat(list(kept.values())))
            del queue[:-NUM_MASKS]
            if are_alike(queue, self._search.distance):
                self._drawn[density] = step

    def facts(self) -> dict[str, float]:
        """For each density the largest distance of its newest mask from those before it."""
        found = {density: self.distances(density) for density in self._queues}
        return {f"distance_{density}": max(one) for density, one in found.items() if one}

    def state_dict(self) -> dict[str, Any]:
        """By density its queue, `[masks, channels]`, and the step at which it was drawn."""
        return {
            "queues": {
                str(one): torch.stack(queue) for one, queue in self._queues.items() if queue
            },
            "drawn": {str(one): step for one, step in self._drawn.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the queues and draws of a checkpoint."""
        queues, drawn = state["queues"], state["drawn"]
        self._queues = {one: list(queues.get(str(one), ())) for one in self._queues}
        self._drawn = {one: drawn[str(one)] for one in self._queues if str(one) in drawn}
