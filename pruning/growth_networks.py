"""The networks of a recursion by their depth, one of them built at a time."""

import math
from functools import cache

import torch
from torch import Tensor

from data.errors import UserError
from pruning.growth import Insertion, change_of_logits, grown_masks, grown_state, prunable_at
from pruning.growth_config import GrowthConfig
from pruning.masks import Masks
from train.models import ModelSpec
from train.session import Session
from train.state import Network

State = dict[str, Tensor]
_LARGEST_CHANGE = 1e-6
"""of a logit by an insertion that is said to preserve them, relative to the largest"""


class Networks:
    """A session's network after 0, 1, 2 ... growths."""

    def __init__(self, session: Session, config: GrowthConfig) -> None:
        self.session, self.config = session, config
        self.spec = cache(self._spec)
        self._built: tuple[int, Network] | None = None

    def _spec(self, depth: int) -> ModelSpec:
        return self.config.spec(self.session.model_spec, depth)

    def at(self, depth: int) -> Network:
        """The network of a depth, ready for training; the one before is let go first."""
        if self._built is None or self._built[0] != depth:
            self._built = None
            self._built = depth, self.session.build_network(self.spec(depth))
        return self._built[1]

    def loaded(self, depth: int, state: State) -> Network:
        """The same with this state."""
        network = self.at(depth)
        network.module.load_state_dict(state)
        return network

    def first_values(self, depth: int) -> State:
        """The state of a fresh network of that depth."""
        return self.spec(depth).build(self.session.seed("init")).state_dict()

    def dense(self, depth: int) -> Masks:
        """Masks that keep everything."""
        weights = prunable_at(self.spec(depth).outline(), self.config.exclude)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return Masks({n: torch.ones(shape, dtype=torch.bool) for n, shape in shapes.items()})

    def grown(
        self, state: State, masks: Masks, depth: int, insertion: Insertion
    ) -> tuple[State, Masks]:
        """State and masks at `depth` from those of one growth less; the new block is dense."""
        source, target = self.spec(depth - 1), self.spec(depth)
        seed = self.session.seed("growth", "insert", depth)
        outlines = source.outline(), target.outline()
        return (
            grown_state(state, source, target, insertion, seed),
            grown_masks(masks, *outlines, self.config.exclude),
        )

    def require_preserving(self) -> None:
        """Raises `UserError` where an insertion that shall preserve logits changes them."""
        shape, seed = self.session.data.image_shape, self.session.seed("init")
        self.at(0)  # which takes these images, or says why not
        for depth in range(self.config.num_kinds):
            source, target = self.spec(depth), self.spec(depth + 1)
            change = change_of_logits(source, target, shape, seed)
            if math.isnan(change) or change > _LARGEST_CHANGE:
                raise UserError(
                    f"insertion = 'preserving': the new block of {target.name} changes logits by "
                    f"{change:.1g} of the largest: choose 'literal' or 'random'"
                )
