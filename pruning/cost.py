"""What a network costs to run, by torch's own counter: dense, and where zeros are skipped."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from data.errors import UserError
from pruning import document
from pruning.masks import LayerDensity, Masks
from pruning.tickets import Ticket
from train.models import ModelSpec


class Cost(NamedTuple):
    """Of one image. A multiplication and its addition are two FLOPs; normalisations, activations
    and biases are not counted, as in torch's counter."""

    image: tuple[int, ...]
    """channels, height, width"""
    flops: int
    """of the dense network"""
    sparse_flops: int
    """where the pruned weights of convolutions and linear layers are skipped: of each layer its
    density's share"""
    parameters: int
    """of the dense network, normalisations and biases too"""
    kept_parameters: int
    bytes: int
    """of the parameters in float32"""


@dataclass(frozen=True)
class DenseCost:
    """What an image costs in a dense network: the same for all of its tickets."""

    image: tuple[int, ...]
    """channels, height, width"""
    flops: int
    parameters: int
    by_weight: Mapping[str, int]
    """FLOPs of the layers whose pruned weights can be skipped, by the names of their weights"""

    def kept(self, layers: Iterable[LayerDensity]) -> Cost:
        """The cost where of each layer only so much is kept."""
        rows = list(layers)
        skipped = sum(self.by_weight.get(row.name, 0) * (1 - row.density) for row in rows)
        pruned = sum(row.size - row.kept for row in rows)
        return Cost(
            self.image,
            self.flops,
            round(self.flops - skipped),
            self.parameters,
            self.parameters - pruned,
            4 * self.parameters,
        )


def dense_cost(model: ModelSpec, image: tuple[int, ...]) -> DenseCost:
    """The cost of an image `[C, H, W]`; nothing is computed.

    Coefficients in a basis are counted as weights of the layers that they stand for, which are
    dense: none is skipped. Raises `UserError` where the network does not take such images.
    """
    network = model.plain.outline().eval()
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *image))
    except (RuntimeError, ValueError, AssertionError) as error:
        shown, reason = "x".join(map(str, image)), str(error).partition("\n")[0]
        raise UserError(f"{model.name} does not take images of {shown}: {reason}") from error
    prefix = f"{type(network).__name__}."
    layers = counter.get_flop_counts().items() if model.basis is None else ()
    return DenseCost(
        image,
        counter.get_total_flops(),
        sum(parameter.numel() for parameter in network.parameters()),
        {f"{name.removeprefix(prefix)}.weight": sum(counts.values()) for name, counts in layers},
    )


def cost_of(model: ModelSpec, masks: Masks, image: tuple[int, ...]) -> Cost:
    """The cost of an image `[C, H, W]` in a masked network. Raises as `dense_cost` does."""
    return dense_cost(model, image).kept(masks.table())


class Costs:
    """Of tickets, on the images that they were trained on; each network is counted once."""

    def __init__(self) -> None:
        self._dense: list[tuple[ModelSpec, tuple[int, ...], DenseCost | None]] = []

    def of(self, ticket: Ticket) -> Cost | None:
        """`None` where no size of images is told, as by imported tickets and those of earlier
        commits, or where it is not believable."""
        try:
            image = document.shape(ticket.config.get("image_shape"), "image_shape")
        except ValueError:
            return None
        dense = self._of_network(ticket.model, image)
        return None if dense is None else dense.kept(ticket.stored_masks.table())

    def _of_network(self, model: ModelSpec, image: tuple[int, ...]) -> DenseCost | None:
        for known, size, dense in self._dense:
            if (known, size) == (model, image):
                return dense
        try:
            found = dense_cost(model, image)
        except UserError:
            found = None
        self._dense.append((model, image, found))
        return found
