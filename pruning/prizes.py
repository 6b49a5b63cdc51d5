"""A multi-prize ticket in memory: the binary network itself, from wherever it was stored."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.errors import RunError, UserError
from pruning.multiprize import as_gain_layer
from pruning.packing import Shape
from pruning.signed_weights import SignedWeights
from pruning.tickets import Ticket
from train.models import ModelSpec


@dataclass(frozen=True)
class PrizeLayer:
    """A layer that computes `layer(x, binary) * gain`."""

    mask: Tensor
    """bool, of the weight's shape"""
    signs: Tensor
    """of the kept weights alone, in row-major order: bool, `True` for +1"""
    gain: float
    """exactly a float32"""
    index: int = 0
    """of the layer in its network: it chooses the stream of signs"""

    @property
    def shape(self) -> Shape:
        """Of the weight."""
        return tuple(self.mask.shape)

    @property
    def kept(self) -> int:
        """Weights that are kept."""
        return self.signs.numel()

    @property
    def binary(self) -> Tensor:
        """+1, -1 or 0, float32."""
        values = torch.zeros(self.shape)
        values[self.mask] = 2 * self.signs.float() - 1
        return values


@dataclass(frozen=True)
class Prize:
    """A binary subnetwork of random weights."""

    model: ModelSpec
    layers: dict[str, PrizeLayer]
    """by the names of their weights"""
    rest: dict[str, Tensor]
    """all other tensors of the state dict"""
    seed: int | None
    """from which the signs can be drawn again, if they can"""

    @classmethod
    def of(cls, ticket: Ticket) -> "Prize":
        """Raises `UserError` for another ticket than a binary one, `RunError` for a damaged one."""
        stored = ticket.stored_weights
        if not isinstance(stored, SignedWeights):
            raise UserError(
                f"ticket {ticket.place} has no binary weights, which an .mpt file is for: those of "
                "recipe = 'multiprize' with weights = 'binary'; choose another format"
            )
        ticket.require_fit()
        if stored.layers.keys() != ticket.masks.keys():
            raise RunError(f"ticket {ticket.id[:12]}: its gains are not those of its masks")
        signs = stored.read_signs(ticket.objects)
        layers = {
            name: PrizeLayer(mask, signs[name][mask] > 0, one.gain, one.index)
            for name, mask in ticket.masks.items()
            if (one := stored.layers[name])
        }
        return cls(ticket.model, layers, stored.rest.read(ticket.objects), stored.seed)

    @property
    def density(self) -> float:
        """The fraction of the layers' weights that is kept."""
        sizes = [layer.mask.numel() for layer in self.layers.values()]
        return sum(layer.kept for layer in self.layers.values()) / sum(sizes)

    def build_model(self) -> nn.Module:
        """The network as it was measured, in evaluation mode: gains after layers, in float32."""

        def as_gain(layer: nn.Module, prize: PrizeLayer) -> None:
            as_gain_layer(layer, prize.binary, torch.tensor(prize.gain))

        return self.build_with(as_gain)

    def build_with(self, change: Callable[[nn.Module, PrizeLayer], None]) -> nn.Module:
        """The network, each of its binary layers changed in place."""
        model = self.model.build()
        for name, prize in self.layers.items():
            change(model.get_submodule(name.rpartition(".")[0]), prize)
        model.load_state_dict(self.rest)
        return model.eval()
